"""A cache gives back what the encoder gave, whatever happened while it was written."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twostep.zoo.context import Context
from twostep.zoo.context_cache import ContextCache, OnlineContexts
from twostep.zoo.encoders import (
    KleinTextEncoder,
    TextEncoder,
    ZImageOmniTextEncoder,
    ZImageTextEncoder,
)

from . import tiny_encoders

PROMPTS = ["", *(f"caption {number} " + "of some length " * (number % 4) for number in range(9)), "造像 café"]


def encoders() -> dict[str, TextEncoder]:
    """In float64, so that what a batch is made of is lost in the rounding to the cache's dtype."""
    model, tokenizer = tiny_encoders.qwen3().double(), tiny_encoders.tokenizer()
    return {
        "z-image": ZImageTextEncoder(model, tokenizer),
        "z-image-omni": ZImageOmniTextEncoder(model, tokenizer, images=1),
        "flux2-klein": KleinTextEncoder(model, tokenizer, layers=(1, 3), max_tokens=96),
    }


ENCODERS = encoders()


@pytest.fixture
def encoder() -> TextEncoder:
    return ENCODERS["z-image"]


def write(folder: Path, encoder: TextEncoder, prompts: list[str] = PROMPTS, **settings) -> None:
    ContextCache.write(folder, encoder, prompts, **{"shard_size": 3, "progress": False, **settings})


def check(context: Context, encoder: TextEncoder, prompts: list[str], dtype: torch.dtype = torch.bfloat16) -> None:
    """The context is the encoder's, rounded to the dtype once."""
    expected = encoder.encode(prompts)
    assert context.encoder == expected.encoder
    assert context.features.dtype == dtype and context.features.device.type == "cpu"
    assert context.features.shape == expected.features.shape
    if expected.lengths is None:
        assert context.lengths is None
    else:
        assert context.lengths is not None
        assert context.lengths.dtype == torch.int64 and torch.equal(context.lengths, expected.lengths)
    assert torch.equal(context.features, expected.features.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ENCODERS)
def test_gives_back_what_the_encoder_gave(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    encoder = ENCODERS[family]
    write(tmp_path, encoder, dtype=dtype)
    cache = ContextCache(tmp_path, encoder)
    assert len(cache) == len(PROMPTS) and cache.template == encoder.template and cache.encoder == encoder.fingerprint
    check(cache[PROMPTS], encoder, PROMPTS, dtype)
    check(cache[PROMPTS[4:5]], encoder, PROMPTS[4:5], dtype)
    check(cache[list(reversed(PROMPTS))], encoder, list(reversed(PROMPTS)), dtype)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_captions_and_places_name_the_same_rows(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    encoder = ENCODERS["z-image"]
    prompts = data.draw(st.lists(st.text(max_size=12), min_size=1, max_size=9))
    prompts = [prompt.encode(errors="replace").decode() for prompt in prompts]
    unique = list(dict.fromkeys(prompts))
    folder = tmp_path_factory.mktemp("cache")
    world = data.draw(st.integers(1, 3))
    for rank in data.draw(st.permutations(range(world))):
        write(
            folder,
            encoder,
            prompts,
            shard_size=data.draw(st.shared(st.integers(1, 4), key="size")),
            batch_size=2,
            rank=rank,
            world_size=world,
        )
    cache = ContextCache(folder)
    assert len(cache) == len(unique)
    places = data.draw(st.lists(st.integers(-len(unique), len(unique) - 1), min_size=1, max_size=6))
    wanted = [unique[place] for place in places]
    check(cache[places], encoder, wanted)
    assert torch.equal(cache[places].features, cache[wanted].features)
    assert torch.equal(cache[places].features, cache[torch.tensor(places)].features)
    check(cache[:], encoder, unique)


def test_says_how_much_disk_it_takes(tmp_path: Path) -> None:
    for name, encoder in ENCODERS.items():
        write(tmp_path / name, encoder)
        expected = ContextCache.bytes_needed(encoder, PROMPTS * 2)
        index = json.loads((tmp_path / name / "index.json").read_text())
        assert expected == index["totals"]["tokens"] * encoder.channels * 2
        used = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        # Shards of three captions have more header than features would have in real ones.
        assert 0 <= used - expected <= len(PROMPTS) * 200 + 5 * 2000


def test_leaves_nothing_but_shards_and_the_index(tmp_path: Path, encoder: TextEncoder) -> None:
    write(tmp_path, encoder)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.json", *(f"contexts-{shard:05d}-of-00004.safetensors" for shard in range(4))}


class Interrupted(Exception):
    pass


class Stops:
    """An encoder that fails at its n-th batch, and counts what it encoded."""

    def __init__(self, encoder: TextEncoder, after: int) -> None:
        self.encoder, self.after, self.seen = encoder, after, []

    def __getattr__(self, name: str):
        return getattr(self.encoder, name)

    def encode(self, prompts: list[str], *, batch_size: int = 32) -> Context:
        if len(self.seen) >= self.after:
            raise Interrupted
        self.seen.append(list(prompts))
        return self.encoder.encode(prompts, batch_size=batch_size)


@pytest.mark.parametrize("after", range(5))
def test_goes_on_at_the_shard_it_was_at(after: int, tmp_path: Path, encoder: TextEncoder) -> None:
    with pytest.raises(Interrupted) if after < 4 else _nothing():
        write(tmp_path, Stops(encoder, after))
    if after < 4:
        with pytest.raises(ValueError, match=rf"not finished, {after} of 4 shards" if after else "holds no contexts"):
            ContextCache(tmp_path)
    rest = Stops(encoder, 100)
    write(tmp_path, rest)
    again = {prompt for batch in rest.seen for prompt in batch}
    assert again == set(PROMPTS[3 * after :])
    check(ContextCache(tmp_path, encoder)[PROMPTS], encoder, PROMPTS)


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


KILLED = """
import os, signal, sys
from pathlib import Path
from twostep.zoo import context_cache
from twostep.zoo.encoders import load_text_encoder
encoder = load_text_encoder(sys.argv[1], dtype=__import__("torch").float64)
prompts = Path(sys.argv[3]).read_text().split("|")
save, saved = context_cache.save_file, []
def save_half(tensors, path, header):
    save(tensors, path, header)
    saved.append(path)
    if len(saved) == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
context_cache.save_file = save_half
context_cache.ContextCache.write(sys.argv[2], encoder, prompts, shard_size=3, progress=False)
"""


def test_survives_a_kill_in_the_middle_of_a_shard(tmp_path: Path, encoder: TextEncoder) -> None:
    (tmp_path / "prompts").write_text("|".join(PROMPTS))
    folder = tmp_path / "cache"
    arguments = [sys.executable, "-c", KILLED, tiny_encoders.zimage(), folder, tmp_path / "prompts"]
    done = subprocess.run(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert len(list(folder.glob(".contexts-00002-of-00004*"))) == 1  # half a shard, under another name
    with pytest.raises(ValueError, match="not finished, 2 of 4 shards"):
        ContextCache(folder)
    rest = Stops(encoder, 100)
    write(folder, rest)
    assert {prompt for batch in rest.seen for prompt in batch} == set(PROMPTS[6:])
    assert not list(folder.glob(".contexts*"))
    check(ContextCache(folder, encoder)[PROMPTS], encoder, PROMPTS)


def test_a_failing_disk_leaves_no_half_shard(tmp_path: Path, encoder: TextEncoder, monkeypatch) -> None:
    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, encoder)
    assert list(tmp_path.iterdir()) == []


def test_the_index_can_be_missing_when_the_shards_are_there(tmp_path: Path, encoder: TextEncoder) -> None:
    write(tmp_path, encoder)
    (tmp_path / "index.json").unlink()
    check(ContextCache(tmp_path, encoder)[PROMPTS], encoder, PROMPTS)


@pytest.mark.parametrize("first", [1, 3])
def test_another_number_of_ranks_may_finish(first: int, tmp_path: Path, encoder: TextEncoder) -> None:
    write(tmp_path, encoder, rank=0, world_size=first + 1)
    assert not (tmp_path / "index.json").exists()
    rest = Stops(encoder, 100)
    for rank in range(2):
        write(tmp_path, rest, rank=rank, world_size=2)
    written = set(PROMPTS) - {prompt for batch in rest.seen for prompt in batch}
    assert written == {prompt for shard in range(0, 4, first + 1) for prompt in PROMPTS[3 * shard : 3 * shard + 3]}
    check(ContextCache(tmp_path, encoder)[PROMPTS], encoder, PROMPTS)


def test_writing_anew_can_be_interrupted_too(tmp_path: Path, encoder: TextEncoder) -> None:
    write(tmp_path, encoder)
    others = [prompt.upper() for prompt in PROMPTS]
    write(
        tmp_path, encoder, others, resume=False, rank=0, world_size=2
    )  # rank 1 has not begun: its shards are the old ones
    with pytest.raises(ValueError, match="come from two writings"):
        ContextCache(tmp_path)
    with pytest.raises(Interrupted):
        write(tmp_path, Stops(encoder, 1), others, resume=False, rank=1, world_size=2)
    rest = Stops(encoder, 100)
    write(tmp_path, rest, others)
    assert {prompt for batch in rest.seen for prompt in batch} == set(others[9:])
    check(ContextCache(tmp_path, encoder)[others], encoder, others)


def test_reports_progress(tmp_path: Path, encoder: TextEncoder) -> None:
    seen: list[tuple[int, int]] = []
    write(tmp_path, encoder, progress=lambda done, total: seen.append((done, total)), rank=1, world_size=2)
    assert seen == [(3, 5), (5, 5)]


def test_says_on_rank_0_how_far_it_is(tmp_path: Path, encoder: TextEncoder, capsys) -> None:
    write(tmp_path, encoder, progress=True, rank=1, world_size=2)
    assert "contexts" not in capsys.readouterr().err
    write(tmp_path, encoder, progress=True, rank=0, world_size=2)
    assert re.search(r"^contexts: (\d+) of \1$", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "flux2-klein"}, r"encoder 'z-image:\w+', not 'flux2-klein:\w+'; template"),
        ({"prompts": [*PROMPTS[1:], "new"]}, "other captions, or another order"),
        ({"dtype": torch.float32}, "dtype 'bfloat16', not 'float32'"),
        ({"shard_size": 2}, "shard_size '3', not '2'"),
    ],
    ids=["encoder", "captions", "dtype", "shard_size"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_mixes_nothing(change: dict, message: str, finished: bool, tmp_path: Path, encoder: TextEncoder) -> None:
    change = dict(change)
    write(tmp_path, encoder)
    if not finished:
        (tmp_path / "index.json").unlink()
        (tmp_path / "contexts-00001-of-00004.safetensors").unlink()
    other = ENCODERS[change.pop("encoder", "z-image")]
    with pytest.raises(ValueError, match=rf"was written for something else: {message}.*resume=False"):
        write(tmp_path, other, **change)
    write(tmp_path, other, **change, resume=False)
    prompts = change.get("prompts", PROMPTS)
    check(ContextCache(tmp_path, other)[prompts], other, prompts, change.get("dtype", torch.bfloat16))
    assert len(list(tmp_path.glob("contexts-*"))) == (6 if "shard_size" in change else 4)


def test_a_reader_checks_the_encoder(tmp_path: Path, encoder: TextEncoder) -> None:
    write(tmp_path, encoder)
    other = ZImageTextEncoder(tiny_encoders.qwen3(seed=3), tiny_encoders.tokenizer(), max_tokens=100)
    message = rf"made with the text encoder {encoder.fingerprint}, and this one is {other.fingerprint}; they differ in "
    with pytest.raises(ValueError, match=message + "weights, max_tokens; write a cache for this encoder"):
        ContextCache(tmp_path, other)
    with pytest.raises(ValueError, match="and this one is z-image:0000;"):
        ContextCache(tmp_path, "z-image:0000")
    with pytest.raises(ValueError, match="made with the text encoder"):
        OnlineContexts(other, ContextCache(tmp_path))
    assert len(ContextCache(tmp_path, encoder.fingerprint)) == len(PROMPTS)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def _overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "contexts-00001-of-00004.safetensors is missing"),
        (_truncate, r"contexts-00001-of-00004.safetensors has \d+ bytes, expected \d+: it is damaged"),
        (_overwrite, "contexts-00001-of-00004.safetensors is not a whole shard"),
    ],
    ids=["missing", "truncated", "overwritten"],
)
def test_names_the_damaged_shard_and_mends_it(
    damage: Callable, message: str, tmp_path: Path, encoder: TextEncoder
) -> None:
    write(tmp_path, encoder)
    path = tmp_path / "contexts-00001-of-00004.safetensors"
    damage(path)
    with pytest.raises(ValueError, match=message):
        ContextCache(tmp_path)[PROMPTS]
    rest = Stops(encoder, 100)
    if damage is Path.unlink:
        write(tmp_path, rest)
    else:
        with pytest.warns(UserWarning, match="is not a whole shard .* it is written again"):
            write(tmp_path, rest)
    assert {prompt for batch in rest.seen for prompt in batch} == set(PROMPTS[3:6])
    check(ContextCache(tmp_path, encoder)[PROMPTS], encoder, PROMPTS)


def test_notices_a_flipped_bit(tmp_path: Path, encoder: TextEncoder) -> None:
    """In a row that is read, and in no other."""
    write(tmp_path, encoder)
    path = tmp_path / "contexts-00001-of-00004.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    cache = ContextCache(tmp_path)
    damaged = []
    for prompt in PROMPTS:
        try:
            check(cache[[prompt]], encoder, [prompt])
        except ValueError as error:
            damaged.append(str(error))
    (said,) = damaged
    assert "contexts-00001-of-00004.safetensors is not what was written: it is damaged" in said
    path.unlink()
    write(tmp_path, encoder)
    check(ContextCache(tmp_path)[PROMPTS], encoder, PROMPTS)


def test_notices_a_shard_of_another_cache(tmp_path: Path, encoder: TextEncoder) -> None:
    write(tmp_path / "a", encoder)
    write(tmp_path / "b", encoder, [prompt.upper() for prompt in PROMPTS])
    name = "contexts-00001-of-00004.safetensors"
    assert (tmp_path / "a" / name).stat().st_size == (tmp_path / "b" / name).stat().st_size
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(ValueError, match="a shard of another cache"):
        ContextCache(tmp_path / "a")[PROMPTS]


def test_refuses_foreign_folders(tmp_path: Path, encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        ContextCache(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no contexts"):
        ContextCache(tmp_path)
    index = tmp_path / "index.json"
    for text, message in [
        ("{", "is not JSON"),
        ("[]", "is not the index of a context cache"),
        ('{"header": {"format": "something"}}', "is not the index of a context cache"),
        ('{"header": {"format": "twostep.contexts", "version": "9"}}', "has version 9, this twostep reads 1"),
    ]:
        index.write_text(text)
        for action in (lambda: ContextCache(tmp_path), lambda: write(tmp_path, encoder, resume=False)):
            with pytest.raises(ValueError, match=message):
                action()
        assert index.read_text() == text


def test_says_what_is_wrong_with_a_key(tmp_path: Path, encoder: TextEncoder) -> None:
    write(tmp_path, encoder)
    cache = ContextCache(tmp_path)
    assert PROMPTS[2] in cache and "unheard of" not in cache and 2 not in cache
    with pytest.raises(ValueError, match=r"2 of 3 captions are not in .*, 'unheard of' among them; .* OnlineContexts"):
        cache[["unheard of", PROMPTS[0], "neither"]]
    with pytest.raises(ValueError, match="place 11 was asked for, and there are 11"):
        cache[[11]]
    with pytest.raises(ValueError, match="an empty batch"):
        cache[[]]
    for key in ("caption", 3, None):
        with pytest.raises(TypeError, match="is not a batch"):
            cache[key]
    with pytest.raises(TypeError, match="a key is float, expected all captions or all places"):
        cache[[1.5]]
    with pytest.raises(TypeError, match="a key is str"):
        cache[[0, PROMPTS[1]]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": "a"}, TypeError, "prompts are one str"),
        ({"prompts": []}, ValueError, "prompts are an empty list"),
        ({"shard_size": 0}, ValueError, "shard_size is 0"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"dtype": torch.int8}, ValueError, "dtype is torch.int8, expected one of torch.bfloat16, torch.float16"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank is 2, expected less than world_size 2"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"world_size": 0}, ValueError, "world_size is 0"),
    ],
)
def test_says_what_is_wrong(change: dict, error: type[Exception], message: str, tmp_path: Path, encoder) -> None:
    with pytest.raises(error, match=message):
        write(tmp_path, encoder, **change)


def test_stores_no_features_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_encoders.qwen3()
    with torch.no_grad():
        model.layers[2].mlp.down_proj.weight.mul_(1e6)
    encoder = ZImageTextEncoder(model, tiny_encoders.tokenizer())
    with pytest.raises(ValueError, match=r"features of .* are not finite in float16; .* choose bfloat16"):
        write(tmp_path, encoder, dtype=torch.float16)
    write(tmp_path, encoder)


def test_a_cache_goes_into_worker_processes(tmp_path: Path, encoder: TextEncoder) -> None:
    write(tmp_path, encoder)
    cache = ContextCache(tmp_path)
    before = cache[PROMPTS]
    assert torch.equal(pickle.loads(pickle.dumps(cache))[PROMPTS].features, before.features)


@pytest.mark.parametrize("family", ENCODERS)
def test_online_contexts_are_the_caches_and_the_encoders(family: str, tmp_path: Path) -> None:
    encoder = ENCODERS[family]
    write(tmp_path, encoder, PROMPTS[::2])
    prompts = [PROMPTS[3], PROMPTS[4], PROMPTS[3], PROMPTS[0], PROMPTS[1]]
    counted = Stops(encoder, 100)
    contexts = OnlineContexts(counted, ContextCache(tmp_path))
    check(contexts[prompts], encoder, prompts)
    assert counted.seen == [[PROMPTS[3], PROMPTS[1]]]
    check(contexts[PROMPTS[::2]], encoder, PROMPTS[::2])
    assert len(counted.seen) == 1 and contexts.encoder == encoder.fingerprint
    alone = OnlineContexts(encoder)[prompts]
    assert torch.equal(alone.features, encoder.encode(prompts).features)
