"""The cache holds what the teacher makes of each prompt, whoever wrote it and however often that was interrupted."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from twostep.disk import size_text
from twostep.train.data import TeacherCache, sample_noise
from twostep.zoo import AdapterBase, Context, Teacher
from twostep.zoo.context_cache import OnlineContexts
from twostep.zoo.encoders import ZImageTextEncoder
from twostep.zoo.miniature import Miniature, miniature
from twostep.zoo.z_image.backbone import ZImageBackbone

PROMPTS = [
    "a red circle",
    "two shapes",
    "a red circle",
    "",
    "a blue square left of a disc",
    "one shape",
    "a green ring",
]
SIZE = (8, 12)
STEPS = 3
SHARDS = 4  # of two prompts


@pytest.fixture(scope="module")
def mini() -> Miniature:
    return miniature(untrained_seed=0)


@pytest.fixture(scope="module")
def contexts(mini: Miniature) -> OnlineContexts:
    return OnlineContexts(ZImageTextEncoder(mini.text_encoder, mini.tokenizer))


@pytest.fixture(scope="module")
def teacher(mini: Miniature) -> Teacher:
    return Teacher(ZImageBackbone(mini.transformer).requires_grad_(False), steps=STEPS)


Write = Callable[..., None]


@pytest.fixture
def write(teacher: Teacher, contexts: OnlineContexts) -> Write:
    def write(folder: Path, prompts: list[str] = PROMPTS, **changes: Any) -> None:
        settings = {"size": SIZE, "seed": 3, "batch": 2, "shard_size": 2, "dtype": torch.float32, "progress": False}
        given = {"teacher": teacher, "contexts": contexts, **settings, **changes}
        TeacherCache.write(folder, given.pop("teacher"), given.pop("contexts"), prompts, **given)

    return write


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder, down to the bits; the order of a header's keys is by chance."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
            continue
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).contiguous() for name in file.keys()}  # noqa: SIM118
            bits = {name: (x.dtype, x.shape, x.view(torch.uint8).numpy().tobytes()) for name, x in tensors.items()}
            found[path.name] = (file.metadata(), bits)
    return found


def euler(
    teacher: Teacher, x: Tensor, context: Context, guidance: float = 1, negative: Context | None = None
) -> list[Tensor]:
    """The states of the teacher's grid, one sample at a time."""
    states, grid = [x], teacher.sigmas(*SIZE)
    with torch.no_grad():
        for a, b in itertools.pairwise(grid):
            v = teacher.backbone.velocity(x, a, context)
            if negative is not None:
                other = teacher.backbone.velocity(x, a, negative)
                v = other + guidance * (v - other)
            x = x + (b - a) * v
            states.append(x)
    return states


def close(found: Tensor, expected: Tensor) -> bool:
    """Up to the rounding that the network itself has at another batch size and padding."""
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_sample_is_the_teachers_from_the_noise_of_its_index(
    batch: int, world_size: int, write: Write, teacher: Teacher, contexts: OnlineContexts, tmp_path: Path
) -> None:
    for rank in reversed(range(world_size)):
        write(tmp_path, batch=batch, rank=rank, world_size=world_size)
    cache = TeacherCache(tmp_path)
    assert len(cache) == len(PROMPTS) and cache.sigmas == teacher.sigmas(*SIZE) and cache.shape == (4, *SIZE)
    found = cache[range(len(PROMPTS))]
    assert sorted(found) == ["indices", "latents"] and found["indices"].tolist() == list(range(7))
    for index, prompt in enumerate(PROMPTS):
        noise = sample_noise(3, [index], (4, *SIZE))
        assert torch.equal(cache.noise([index]), noise)
        assert close(found["latents"][index], teacher.sample(noise, contexts[[prompt]])[0])
    assert not close(found["latents"][0], found["latents"][2])  # one prompt, two samples
    mixed = cache[torch.tensor([5, 0, 5])]
    assert torch.equal(mixed["latents"], found["latents"][[5, 0, 5]]) and mixed["indices"].tolist() == [5, 0, 5]


def test_ranks_write_the_same_bits_as_one_process(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "one")
    for rank in (1, 0):
        write(tmp_path / "two", rank=rank, world_size=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == SHARDS + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_the_dtype_that_was_asked_for(dtype: torch.dtype, write: Write, tmp_path: Path) -> None:
    write(tmp_path / "wide")
    write(tmp_path / "narrow", dtype=dtype)
    wide, narrow = (TeacherCache(tmp_path / name)[[0, 6]]["latents"] for name in ("wide", "narrow"))
    assert narrow.dtype == dtype and torch.equal(narrow, wide.to(dtype))


def test_anchors_are_the_states_on_the_way_with_guidance(
    write: Write, teacher: Teacher, contexts: OnlineContexts, tmp_path: Path
) -> None:
    negative = contexts[[""]]
    guided = Teacher(teacher.backbone, steps=STEPS, guidance=3.0, negative=negative)
    for step in (1, 2):
        sigma = round(teacher.sigmas(*SIZE)[step], 4)
        write(tmp_path / str(step), teacher=guided, anchor_sigma=sigma)
        cache = TeacherCache(tmp_path / str(step))
        assert cache.anchor_sigma == teacher.sigmas(*SIZE)[step]
        found = cache[[4, 1]]
        for row, index in enumerate((4, 1)):
            states = euler(teacher, cache.noise([index]), contexts[[PROMPTS[index]]], 3.0, negative)
            assert close(found["anchors"][row], states[step][0]) and close(found["latents"][row], states[-1][0])


@pytest.mark.parametrize("sigma", [0.97, 0.75, 0.2])
def test_an_anchor_between_two_steps_is_where_a_shorter_step_would_end(
    sigma: float, write: Write, teacher: Teacher, contexts: OnlineContexts, tmp_path: Path
) -> None:
    """As DP-DMD runs the teacher where it brings no anchor; the sample is the one without."""
    write(tmp_path / "with", anchor_sigma=sigma, dtype=torch.bfloat16)
    write(tmp_path / "without", dtype=torch.bfloat16)
    cache, plain = TeacherCache(tmp_path / "with"), TeacherCache(tmp_path / "without")
    assert cache.anchor_sigma == sigma
    found = cache[[4, 1]]
    assert torch.equal(found["latents"], plain[[4, 1]]["latents"]) and found["latents"].dtype == torch.bfloat16
    assert found["anchors"].dtype == torch.float32
    grid = teacher.sigmas(*SIZE)
    before = max(step for step, level in enumerate(grid) if level > sigma)
    for row, index in enumerate((4, 1)):
        context = contexts[[PROMPTS[index]]]
        x = euler(teacher, cache.noise([index]), context, 1.0, None)[before]
        with torch.no_grad():
            expected = x + (sigma - grid[before]) * teacher.velocity(x, grid[before], context)
        assert close(found["anchors"][row], expected[0])


@pytest.mark.parametrize("sigma", [0.0, 1.0, -0.1, math.nan])
def test_an_anchor_lies_between_noise_and_image(sigma: float, write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"anchor_sigma is {sigma}, expected a number between 0 and 1"):
        write(tmp_path, anchor_sigma=sigma)


class Interrupted(Exception):
    pass


class Stops:
    """Contexts that fail when they are asked for the n-th time, and count what they gave."""

    def __init__(self, contexts: OnlineContexts, after: int) -> None:
        self.contexts, self.after, self.encoder = contexts, after, contexts.encoder
        self.seen: list[str] = []

    def __getitem__(self, prompts: list[str]) -> Context:
        if self.after == 0:
            raise Interrupted
        self.after -= 1
        self.seen += prompts
        return self.contexts[prompts]


@pytest.mark.parametrize("after", [0, 3, 5])
def test_goes_on_where_it_was_interrupted(after: int, write: Write, contexts: OnlineContexts, tmp_path: Path) -> None:
    write(tmp_path / "whole", batch=1)
    folder = tmp_path / "cut"
    with pytest.raises(Interrupted):
        write(folder, batch=1, contexts=Stops(contexts, after))
    shards = after // 2
    message = f"not finished, {shards} of 4 shards" if shards else "holds no teacher samples"
    with pytest.raises(ValueError, match=message):
        TeacherCache(folder)
    assert not list(folder.glob(".*"))
    reports: list[tuple[int, int]] = []
    rest = Stops(contexts, 100)
    write(folder, batch=1, contexts=rest, progress=lambda *report: reports.append(report))
    assert rest.seen == PROMPTS[2 * shards :]
    assert contents(folder) == contents(tmp_path / "whole")
    assert reports == sorted(reports) and reports[-1] == (7, 7)
    write(folder, batch=1, contexts=Stops(contexts, 0))  # nothing is left to do


def test_writes_a_damaged_shard_again(write: Write, contexts: OnlineContexts, tmp_path: Path) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    os.truncate(tmp_path / "pairs-00001-of-00004.safetensors", 300)
    with pytest.raises(ValueError, match=r"has 300 bytes, expected \d+: it is damaged"):
        TeacherCache(tmp_path)
    counting = Stops(contexts, 100)
    with pytest.warns(UserWarning, match="not a whole shard"):
        write(tmp_path, contexts=counting)
    assert counting.seen == PROMPTS[2:4] and contents(tmp_path) == before


def test_notices_a_flipped_bit(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "pairs-00001-of-00004.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    cache, damaged = TeacherCache(tmp_path), []
    for index in range(len(cache)):
        try:
            cache[[index]]
        except ValueError as error:
            damaged.append((index, str(error)))
    ((index, said),) = damaged
    assert index in (2, 3)
    assert "pairs-00001-of-00004.safetensors is not what was written: it is damaged" in said


def test_refuses_to_mix_two_writings(
    write: Write, teacher: Teacher, contexts: OnlineContexts, mini: Miniature, tmp_path: Path
) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    other = miniature(untrained_seed=1)
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "another seed": ("seed '3', not '4'", {"seed": 4}),
        "another size": ("shape", {"size": (8, 8)}),
        "another dtype": ("dtype 'float32', not 'bfloat16'", {"dtype": torch.bfloat16}),
        "another grid": ("sigmas", {"teacher": Teacher(teacher.backbone, steps=4)}),
        "another shift": ("sigmas", {"teacher": Teacher(teacher.backbone, steps=STEPS, shift=1.0)}),
        "guidance": (
            "guidance",
            {"teacher": Teacher(teacher.backbone, steps=STEPS, guidance=2.0, negative=contexts[[""]])},
        ),
        "an anchor": ("anchor_sigma 'null', not '0.", {"anchor_sigma": teacher.sigmas(*SIZE)[1]}),
        "other weights": ("teacher 'z-image", {"teacher": Teacher(ZImageBackbone(other.transformer), steps=STEPS)}),
        "another encoder": (
            "encoder",
            {"contexts": OnlineContexts(ZImageTextEncoder(other.text_encoder, other.tokenizer))},
        ),
        "other prompts": ("other prompts, or another order", {"prompts": PROMPTS[::-1]}),
        "other shards": ("shard_size", {"shard_size": 3}),
    }
    for name, (message, change) in changes.items():
        with pytest.raises(ValueError, match=f"was written for something else: {message}"):
            write(tmp_path, **change)
        assert contents(tmp_path) == before, name
    write(tmp_path, seed=4, shard_size=3, resume=False)
    assert TeacherCache(tmp_path).seed == 4 and len(contents(tmp_path)) == 4


def test_checks_that_it_is_of_this_teacher_and_prompts(write: Write, teacher: Teacher, tmp_path: Path) -> None:
    write(tmp_path)
    cache = TeacherCache(tmp_path)
    cache.check(teacher, PROMPTS)
    for other, prompts, what in (
        (Teacher(teacher.backbone, steps=5), PROMPTS, "sigmas"),
        (teacher, PROMPTS[:-1], "prompts"),
    ):
        with pytest.raises(ValueError, match=f"were made with other {what};"):
            cache.check(other, prompts)


def test_a_base_under_adapters_is_the_teacher_that_it_was(write: Write, tmp_path: Path) -> None:
    """What the command wrote with the plain model serves a run in which one base carries all roles."""
    write(tmp_path)
    cache = TeacherCache(tmp_path)
    roles = AdapterBase(ZImageBackbone(miniature(untrained_seed=0).transformer))
    adapter = roles.add("step_1", rank=2)
    cache.check(Teacher(roles.base, steps=STEPS), PROMPTS)
    with pytest.raises(ValueError, match="were made with other teacher;"):
        cache.check(Teacher(adapter, steps=STEPS), PROMPTS)


def test_asks_for_room_on_the_disk_before_it_samples(
    write: Write, contexts: OnlineContexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "real")
    used = {path.name: path.stat().st_size for path in (tmp_path / "real").glob("*.safetensors")}
    usage = namedtuple("usage", "total used free")
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
    estimates = []
    for folder in ("new", "real"):  # of a folder that has a shard already, only the others are asked for
        if folder == "real":
            for name in list(used)[1:]:
                (tmp_path / "real" / name).unlink()
        with pytest.raises(
            ValueError, match=r"are to be written to .*, and 0 bytes \(0 bytes\) are free there"
        ) as caught:
            write(tmp_path / folder, contexts=Stops(contexts, 0))
        estimates.append(int(str(caught.value).split("(")[1].split(" bytes")[0]))
    assert estimates[0] - SHARDS * 2100 <= sum(used.values()) <= estimates[0]
    assert estimates[1] - SHARDS * 2100 <= sum(list(used.values())[1:]) <= estimates[1]
    free = estimates[1]
    write(tmp_path / "real")
    assert len(TeacherCache(tmp_path / "real")) == 7


def test_sizes_read_as_people_read_them() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 2**20, 5 * 2**40)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "1.5 KiB", "1.0 MiB", "5.0 TiB",
    ]  # fmt: skip


def test_refuses_samples_that_are_not_finite(write: Write, teacher: Teacher, tmp_path: Path) -> None:
    class Overflows(Teacher):
        def velocity(self, x: Tensor, sigma: Any, context: Context, **options: Any) -> Tensor:
            v = torch.zeros_like(x)
            v[1] = 1e6  # float16 ends at 65504
            return v

    hot = Overflows(teacher.backbone, steps=STEPS)
    with pytest.raises(ValueError, match=r"sample of prompt 1, 'two shapes', is not finite in torch\.float16"):
        write(tmp_path, teacher=hot, dtype=torch.float16)


def test_refuses_what_is_no_cache_and_no_batch(write: Write, teacher: Teacher, tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "no", "there is no folder"), (tmp_path, "holds no teacher samples")):
        with pytest.raises(ValueError, match=message):
            TeacherCache(folder)
    write(tmp_path)
    cache = TeacherCache(tmp_path)
    for wrong in ([7], [-1], [True]):
        with pytest.raises(ValueError, match=r"was asked for, and .* has 7 prompts"):
            cache[wrong]
    for wrong in (3, [], "a"):
        with pytest.raises(TypeError, match="is not a batch"):
            cache[wrong]  # type: ignore[index]
    for change, message in (
        ({"size": (7, 8)}, r"size is \(7, 8\), expected \(height, width\) of latents, multiples of 2"),
        ({"dtype": torch.float64}, "dtype is torch.float64, expected one of"),
        ({"prompts": []}, "expected a sequence of at least one str"),
        ({"batch": 0}, "batch is 0"),
        ({"teacher": Teacher(teacher.backbone, guidance=2.0)}, "it has no negative context"),
        ({"teacher": Teacher(teacher.backbone, eta=0.5)}, "what is cached follows from its noise alone"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "new", **change)
    index = json.loads((tmp_path / "index.json").read_text())
    index["header"]["version"] = "0"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has version 0, this twostep reads 1"):
        TeacherCache(tmp_path)
