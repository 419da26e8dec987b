#!/usr/bin/env bash
# Everything that a GPU machine can say about the kernels, in one call of less than ten minutes:
#
#   benchmarks/gpu.sh OUTDIR
#
# Builds against the torch that `python3` has (PYTHON=... chooses another), runs the GPU tests, compute-sanitizer over
# every kernel, the kernel table and the overhead of a call, the models beside stock diffusers, exported forms beside the
# teacher, and the memory of the two-step backward and of the stash. It needs no network: wheels of missing packages and
# of peers (liger-kernel, quack, diffusers, ...) are taken from the folder WHEELS (default: wheels/, then .whl/), if there
# is one. Every stage has a time limit and leaves its log in OUTDIR; a stage that fails does not stop the next, and the
# exit status is the number of stages that failed. STAGES="build kernels" runs only those (of: build tests sanitizer
# models unroll stash forms launch kernels). benchmarks/full_size.py, the update at Z-Image's real size, is a call of its
# own.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { echo "usage: benchmarks/gpu.sh OUTDIR" >&2; exit 64; }
mkdir -p "$1" && out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
failed=0
export PYTHONUNBUFFERED=1

stage() { # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [[ -z "${STAGES:-}" || " $STAGES " == *" $name "* ]] || return 0
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  [ $status -eq 0 ] || failed=$((failed + 1))
  printf '%-14s %s after %d s\n' "$name" "$([ $status -eq 0 ] && echo passed || echo "FAILED ($status)")" $((SECONDS - start)) | tee -a "$out/summary.txt"
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"' || exit 69
{ date -u +%F; nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; "$python" -c 'import torch; print("torch", torch.__version__)'; } | tee "$out/summary.txt"

site=$out/.site
for wheels in "${WHEELS:-wheels}" .whl; do
  compgen -G "$wheels/*.whl" >/dev/null || continue
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl && break
done
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

build() {
  "$python" -m pip install --no-index --no-deps --no-build-isolation --no-compile --upgrade --target "$site" . && "$python" -m twostep.doctor
}
sanitize() { # one small call of every kernel; racecheck and memcheck slow a kernel down by two orders of magnitude
  local tool status=0
  for tool in memcheck racecheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 99 "$python" benchmarks/every_kernel.py || status=1
  done
  return $status
}
tests() { "$python" -m pytest -p no:cacheprovider -m gpu tests -q; }

stage build 240 build
stage tests 150 tests
stage sanitizer 100 sanitize
stage models 90 "$python" benchmarks/stock_vs_fused.py --device cuda --seconds 0.5 --out "$out"
stage unroll 60 "$python" -m twostep bench unroll --device cuda --out "$out"
stage stash 30 "$python" -m pytest -q -p no:cacheprovider benchmarks/bench_stash.py --benchmark-json "$out/stash.json"
stage forms 150 "$python" benchmarks/exported_forms.py --device cuda --seconds 0.5 --batch 32 --out "$out"
stage launch 40 "$python" -m twostep bench launch --device cuda --no-compile --out "$out"
stage kernels 180 "$python" -m twostep bench --device cuda --seconds 0.03 --out "$out" \
  --shapes 4x4608x3840 1x4608x3840 4x1152x3840 1x1152x3840 4x4608x3072 4x4608x4096
[ -f "$out/kernels.log" ] && tail -n 12 "$out/kernels.log"
rm -rf "$site"
cat "$out/summary.txt"
exit $failed
