#!/bin/bash
# Trains on the nodes of a SLURM job, and goes on in a next job where the time of this one ends:
#
#     sbatch --nodes 2 examples/slurm.sh z-image-turbo-pp data.prompts=prompts.txt out=runs/first
#
# Arguments are those of `twostep train`; the folder of `out` must be one that all nodes see. Before the job's time is
# over, SLURM signals this shell, this shell signals the ranks of its own node, and all ranks finish their update, save
# and end with 0 (one that is signalled is enough). The job then goes back into the queue, and the same command goes on.
# The ranks are signalled and not torchrun, which would kill them 30 seconds after it has handed a signal on.

#SBATCH --job-name=twostep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900

# @900 above: seconds before the end. An update and a checkpoint have to fit in.

set -euo pipefail

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # whole: piped into head, it may die of the closed pipe
first=${nodes%%$'\n'*}
agent="/tmp/twostep-$SLURM_JOB_ID.pid" # of this node's torchrun
stopped=no

stop() {
    stopped=yes
    pkill -TERM --parent "$(cat "$agent")" || true
}
trap stop USR1

srun --kill-on-bad-exit=1 bash -c 'echo $$ > "$0"; exec "$@"' "$agent" \
    torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:${PORT:-29500}" \
    --rdzv-id="$SLURM_JOB_ID" \
    -m twostep train "$@" &
step=$!

status=0
wait "$step" || status=$?
while kill -0 "$step" 2> /dev/null; do # a signal has ended the wait, not the step
    status=0
    wait "$step" || status=$?
done
rm -f "$agent"

if [ "$stopped" = yes ] && [ "$status" = 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
