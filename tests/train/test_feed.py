"""Batches are what caches, folders and drawn data say, and a feed goes on bit for bit where a checkpoint left it."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from twostep.train import parts as parts_module
from twostep.train.data import ImageFolder, Order, ShapesBatches, TeacherCache
from twostep.train.feed import Feed, make_feed
from twostep.train.methods import TrainingBatch
from twostep.train.parts import Parts, SharedContexts
from twostep.train.recipe import DataConfig, ImagesData, KeepConfig, PromptsData, ShapesData
from twostep.zoo import Teacher, load_backbone, miniature
from twostep.zoo.context import Context
from twostep.zoo.context_cache import ContextCache
from twostep.zoo.miniature import samples

from .test_parts import equal, forbidden, klein_folder, mini_folder, parts_of

PROMPTS = ["a red circle", "two shapes", "a blue square", "a red circle", "a green ring", "one shape", "a star"]
KINDS = (
    "prompts",
    "prompts, contexts made here",
    "images",
    "images, and prompts to keep",
    "images of klein",
    "shapes",
    "shapes, a pool",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with contexts and the teacher's samples, and images of two buckets."""
    folder: Path = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    encoder = shared_parts(False).text_encoder
    ContextCache.write(folder / "contexts", encoder, [*PROMPTS, ""], dtype=torch.float32, progress=False)
    teacher = Teacher(load_backbone(mini_folder(), dtype=torch.float32), steps=2)
    contexts = ContextCache(folder / "contexts")
    for name, sigma in (("teacher", None), ("anchors", 0.75)):
        TeacherCache.write(
            folder / name, teacher, contexts, PROMPTS, size=(8, 6), seed=5, anchor_sigma=sigma, progress=False
        )
    save_images(folder / "images", [(64, 64)] * 5 + [(40, 80)] * 3)
    save_images(folder / "squares", [(64, 64)] * 5)
    return folder


def save_images(folder: Path, sizes: list[tuple[int, int]]) -> None:
    folder.mkdir()
    for number, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(("a red circle", "two shapes", "a small star")[number % 3])


def data_of(kind: str, made: Path) -> DataConfig:
    prompts = {"prompts": made / "prompts.txt", "teacher": made / "anchors"}
    kinds: dict[str, DataConfig] = {
        "prompts": PromptsData(contexts=made / "contexts", **prompts),
        "prompts, contexts made here": PromptsData(**prompts),
        "images": ImagesData(folder=made / "images"),
        "images, and prompts to keep": ImagesData(
            folder=made / "images", keep=KeepConfig(prompts=made / "prompts.txt", share=0.6)
        ),
        "images of klein": ImagesData(folder=made / "images", area=24 * 24),
        "shapes": ShapesData(),
        "shapes, a pool": ShapesData(pool=6),
    }
    return kinds[kind]


def feed_of(data: DataConfig, *, klein: bool = False, batch: int = 2, parts: Parts | None = None, **more: Any) -> Feed:
    settings: dict[str, Any] = {"seed": 1, "rank": 0, "world_size": 1, "wants": frozenset(), "device": "cpu", **more}
    latents = {"latent_channels": 16, "latent_factor": 1} if klein else {"latent_channels": 4, "latent_factor": 2}
    return make_feed(data, parts or shared_parts(klein), batch=batch, **{**latents, **settings})


@cache
def shared_parts(klein: bool) -> Parts:
    return parts_of(klein_folder() if klein else mini_folder())


def whole_feed(kind: str, made: Path, **more: Any) -> Feed:
    """With everything in its batches that this kind can have."""
    wants = {"latents", "anchor" if kind.startswith("prompts") else "target_context"}
    batch = 5 if "to keep" in kind else 2  # two images in any case
    return feed_of(data_of(kind, made), klein="klein" in kind, **{"wants": frozenset(wants), "batch": batch, **more})


def same(one: TrainingBatch, other: TrainingBatch) -> bool:
    """Bit for bit."""

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, Context):
            return (
                equal(a, b)
                and len(a.references) == len(b.references)
                and all(map(torch.equal, a.references, b.references))
            )
        return a == b

    return all(alike(getattr(one, field.name), getattr(other, field.name)) for field in fields(TrainingBatch))


def take(feed: Feed, count: int) -> list[TrainingBatch]:
    return list(itertools.islice(feed, count))


# Going on


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(kind: str, made: Path) -> None:
    with closing(whole_feed(kind, made)) as feed:
        expected = take(feed, 9)
    with closing(whole_feed(kind, made)) as feed:
        head, state = take(feed, 4), json.loads(json.dumps(feed.state_dict()))
        take(feed, 1)  # after the checkpoint
    with closing(whole_feed(kind, made)) as resumed:
        resumed.load_state_dict(state)
        found = head + take(resumed, 5)
        assert resumed.state_dict() != state
        resumed.load_state_dict(state)  # going back, as after trouble
        again = head + take(resumed, 5)
    assert all(map(same, found, expected)) and all(map(same, again, expected))
    assert not any(same(one, other) for one, other in itertools.combinations(expected[:3], 2))
    for batch in expected:
        assert batch.latents is not None and batch.latents.dtype == torch.float32
        assert batch.shape == tuple(batch.latents.shape) and len(batch.latents) == 2 == batch.context.batch
        assert not batch.latents.requires_grad and not batch.context.features.requires_grad


def test_its_state_is_of_what_was_taken_however_much_was_made_ahead(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, draw = threading.Semaphore(0), ShapesBatches.__next__

    def counted(batches: ShapesBatches) -> Any:
        drawn = draw(batches)
        begun.release()
        return drawn

    monkeypatch.setattr(ShapesBatches, "__next__", counted)
    with closing(whole_feed("shapes", made)) as feed:
        assert feed.state_dict()["position"] == 0
        next(feed)
        assert all(begun.acquire(timeout=60) for _ in range(3))  # the thread is at its third batch
        assert feed.state_dict()["position"] == 2  # of two samples


@pytest.mark.parametrize("kind", KINDS)
def test_another_world_size_goes_on_where_the_order_stands(kind: str, made: Path) -> None:
    """Ranks take the single process's batches in turn; what three of them leave, one takes up."""
    with closing(whole_feed(kind, made)) as feed:
        expected = [rows(batch) for batch in take(feed, 8)]
    ranks = [whole_feed(kind, made, rank=rank, world_size=3) for rank in range(3)]
    found = [rows(batch) for _ in range(2) for batch in (next(feed) for feed in ranks)]
    states = [feed.state_dict() for feed in ranks]
    for feed in ranks:
        feed.close()
    assert states[0] == states[1] == states[2]
    with closing(whole_feed(kind, made)) as feed:
        feed.load_state_dict(states[0])
        found += [rows(batch) for batch in take(feed, 2)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def rows(batch: TrainingBatch) -> Tensor:
    assert batch.latents is not None
    kept = [] if batch.kept is None else [batch.kept.features.flatten()]
    return torch.cat([batch.latents.flatten(), *kept])


def test_has_torchs_and_torchdatas_protocol_of_a_state(made: Path) -> None:
    """torchdata's Stateful asks for the same two methods."""
    with closing(whole_feed("shapes", made)) as feed:
        assert isinstance(feed, Stateful) and isinstance(feed, Iterator)


def test_closing_ends_the_thread_and_loses_nothing(made: Path) -> None:
    before = threading.active_count()
    feed = whole_feed("shapes", made)
    first = take(feed, 2)
    feed.close()
    assert threading.active_count() == before
    second = take(feed, 2)
    feed.close()
    with closing(whole_feed("shapes", made)) as other:
        assert all(map(same, [*first, *second], take(other, 4)))


# Prompts


@pytest.mark.parametrize("kind", ["prompts", "prompts, contexts made here"])
def test_prompts_come_with_what_their_caches_hold(kind: str, made: Path) -> None:
    order, teacher = Order(len(PROMPTS), 2, seed=1, rank=1, world_size=2), TeacherCache(made / "anchors")
    encoder = shared_parts(False).text_encoder
    with closing(whole_feed(kind, made, rank=1, world_size=2)) as feed:
        assert feed.shape == (4, 8, 6)
        for batch in take(feed, 5):
            indices = next(order)
            prompts, there = [PROMPTS[index] for index in indices], teacher[indices]
            assert batch.context.encoder == encoder.fingerprint
            expected = encoder.encode(prompts)
            assert torch.equal(batch.context.token_lengths, expected.token_lengths)
            assert torch.allclose(batch.context.features, expected.features, atol=1e-5)
            assert batch.latents is not None and torch.equal(batch.latents, there["latents"].float())
            assert batch.anchor is not None and torch.equal(batch.anchor, there["anchors"].float())
            assert batch.anchor_noise is not None and torch.equal(batch.anchor_noise, teacher.noise(indices))


def test_hands_out_what_is_wanted(made: Path) -> None:
    def found(teacher: str | None, *wants: str) -> set[str]:
        data = PromptsData(prompts=made / "prompts.txt", teacher=None if teacher is None else made / teacher)
        with closing(feed_of(data, wants=frozenset(wants))) as feed:
            batch = next(feed)
        names = ("latents", "anchor", "anchor_noise", "target_context")
        return {name for name in names if getattr(batch, name) is not None}

    assert found("anchors", "latents") == {"latents"}
    assert found("anchors", "anchor") == {"anchor", "anchor_noise"}
    assert found("anchors", "latents", "anchor") == {"latents", "anchor", "anchor_noise"}
    assert found("teacher") == set()
    assert found(None) == set()


def test_sizes_come_from_the_recipe_the_cache_or_the_model(made: Path) -> None:
    def shape(klein: bool = False, **more: Any) -> Any:
        with closing(feed_of(PromptsData(prompts=made / "prompts.txt", **more), klein=klein)) as feed:
            assert feed.shape is not None
            assert next(feed).shape == (2, *feed.shape)
            return feed.shape

    assert shape() == (4, 16, 16)
    assert shape(size=(32, 48)) == (4, 8, 12)
    assert shape(teacher=made / "teacher") == (4, 8, 6)
    assert shape(teacher=made / "teacher", size=(32, 24)) == (4, 8, 6)
    assert shape(klein=True) == (16, 8, 8)
    with pytest.raises(ValueError, match=r"data\.size is 32 x 44, expected multiples of 8"):
        shape(size=(32, 44))
    with pytest.raises(ValueError, match=r"data\.size is 32 x 32, and the samples in .* are of 32 x 24"):
        shape(teacher=made / "teacher", size=(32, 32))


def test_a_run_on_caches_loads_no_encoder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "CHEAP", 0)
    monkeypatch.setattr(parts_module, "load_text_encoder", forbidden)
    monkeypatch.setattr(parts_module, "load_autoencoder", forbidden)
    with closing(whole_feed("prompts", made, parts=parts_of(mini_folder()))) as feed:
        assert next(feed).latents is not None
        assert feed.identity()["teacher"]
    assert parts_of(mini_folder(), cache=made / "contexts").empty.batch == 1


def test_says_which_cache_does_not_fit(made: Path, tmp_path: Path) -> None:
    other, turned = tmp_path / "other.txt", tmp_path / "turned.txt"
    other.write_text("\n".join([*PROMPTS, "a heart"]))
    turned.write_text("\n".join(reversed(PROMPTS)))
    ours, anchors = made / "prompts.txt", frozenset({"anchor"})
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (
            r"1 of the 8 prompts .* 'a heart' among them",
            {"prompts": tmp_path / "other.txt", "contexts": "contexts"},
            {},
        ),
        (
            r"are of 7 other prompts than the 7 of .*order",
            {"prompts": tmp_path / "turned.txt", "teacher": "teacher"},
            {},
        ),
        (r"wants anchor: write them with `twostep cache --anchor-sigma`", {}, {"wants": anchors}),
        (r"no anchors.* --anchor-sigma 0\.6`", {"teacher": "teacher"}, {"wants": anchors, "anchor_sigma": 0.6}),
        (r"at sigma 0\.75, and .* 0\.6: write", {"teacher": "anchors"}, {"wants": anchors, "anchor_sigma": 0.6}),
        (r"learns from images, and prompts have none", {}, {"wants": frozenset({"target_context"})}),
        (r"take latents of 5 channels, and the autoencoder of .* makes 4", {}, {"latent_channels": 5}),
    ]
    for message, files, more in cases:
        given = {key: made / value if isinstance(value, str) else value for key, value in files.items()}
        with pytest.raises(ValueError, match=message):
            feed_of(PromptsData(**{"prompts": ours, **given}), **more)
    with closing(
        feed_of(PromptsData(prompts=ours, teacher=made / "anchors"), wants=anchors, anchor_sigma=0.75)
    ) as feed:
        assert next(feed).anchor is not None
    with pytest.raises(ValueError, match=r"are of kind 'shapes'|is of kind 'shapes'"):
        feed_of(ShapesData(), wants=anchors)


def test_samples_of_another_text_encoder_are_refused(made: Path, tmp_path: Path) -> None:
    miniature(untrained_seed=1).save(tmp_path)
    data = PromptsData(prompts=made / "prompts.txt", teacher=made / "teacher")
    feed = feed_of(data, parts=parts_of(tmp_path), wants=frozenset({"latents"}))
    with closing(feed), pytest.raises(ValueError, match=r"data\.teacher: .* were made with contexts of z-image:"):
        next(feed)


# Images


def test_of_several_buckets_the_usual_shape_is_the_square_of_their_area(made: Path) -> None:
    for area, side in ((None, 16), (32 * 32, 8), (100 * 100, 24)):
        with closing(feed_of(ImagesData(folder=made / "images", area=area))) as feed:
            assert feed.shape is None and feed.usual == (4, side, side)
    with closing(feed_of(ImagesData(folder=made / "images", area=24 * 24), klein=True)) as feed:
        assert feed.shape is None and feed.usual == (16, 6, 6)
    with closing(feed_of(PromptsData(prompts=made / "prompts.txt", size=(32, 48)))) as feed:
        assert feed.shape == feed.usual == (4, 8, 12)


@torch.no_grad()
def test_images_become_latents_and_contexts_each_by_itself(made: Path) -> None:
    parts, images = shared_parts(False), ImageFolder(made / "images", area=64 * 64, factor=8)
    target = parts.target_encoder(None, 512 * 512)
    seen: set[int] = set()
    table = [parts.autoencoder.encode(images[number][None]) for number in range(len(images))]
    with closing(whole_feed("images", made)) as feed:
        assert feed.shape is None
        for batch in take(feed, 5):
            assert batch.latents is not None and batch.target_context is not None
            for row, latents in enumerate(batch.latents):
                number = next(n for n, known in enumerate(table) if torch.equal(known[0], latents))
                caption = [images.caption(number)]
                alone = parts.contexts(None)[caption]
                assert equal(batch.context[row : row + 1], alone)
                seen_together = target(caption, images[number][None], alone, None)
                assert equal(batch.target_context[row : row + 1], seen_together)
                seen.add(number)
    assert len(seen) >= 7


def test_what_is_kept_in_memory_is_not_made_again_and_changes_no_bit(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    look = ImageFolder.__getitem__

    def looked(folder: ImageFolder, number: int) -> Tensor:
        read.append(number)
        return look(folder, number)

    monkeypatch.setattr(ImageFolder, "__getitem__", looked)
    found, reads = [], []
    for memory in (0, 80_000, 1 << 30):  # an image's take about 25,000 bytes
        read.clear()
        data = ImagesData(folder=made / "images", memory=memory)
        with closing(feed_of(data, wants=frozenset({"latents", "target_context"}))) as feed:
            found.append(take(feed, 12))
        reads.append(len(read))
    for batches in found[1:]:
        assert all(map(same, batches, found[0]))
    assert reads[0] >= 24 and reads[2] == 8  # each of the 8 images once
    assert reads[2] < reads[1] < reads[0]


def test_klein_sees_its_latents_beside_the_caption(made: Path) -> None:
    with closing(whole_feed("images of klein", made)) as feed:
        batch = next(feed)
    assert batch.target_context is not None and batch.latents is not None
    assert torch.equal(batch.target_context.references[0], batch.latents)
    assert torch.equal(batch.target_context.features, batch.context.features) and not batch.context.references


def test_images_that_nobody_wants_are_not_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFolder, "__getitem__", forbidden)
    monkeypatch.setattr(parts_module, "load_autoencoder", forbidden)
    with closing(feed_of(ImagesData(folder=made / "squares"), parts=parts_of(mini_folder()))) as feed:
        batch = next(feed)
    assert batch.shape == (2, 4, 16, 16) and batch.latents is None and batch.target_context is None


def test_a_damaged_image_is_named_and_the_feed_goes_on_when_it_is_mended(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "squares", tmp_path / "i")
    whole = {path: path.read_bytes() for path in (tmp_path / "i").glob("*.png")}
    data, wants = ImagesData(folder=tmp_path / "i"), frozenset({"latents"})
    with closing(feed_of(data, wants=wants)) as feed:
        expected = take(feed, 3)
    feed = feed_of(data, wants=wants)
    state = feed.state_dict()
    for path, content in whole.items():
        path.write_bytes(content[:200])
    with pytest.raises(ValueError, match=r"\.png is damaged"):
        next(feed)
    assert feed.state_dict() == state
    for path, content in whole.items():
        path.write_bytes(content)
    feed.load_state_dict(state)
    with closing(feed):
        assert all(map(same, take(feed, 3), expected))


def test_a_state_of_other_images_is_refused(made: Path, tmp_path: Path) -> None:
    with closing(feed_of(ImagesData(folder=made / "squares"))) as feed:
        state = feed.state_dict()
    shutil.copytree(made / "squares", tmp_path / "i")
    with closing(feed_of(ImagesData(folder=tmp_path / "i"))) as feed:
        feed.load_state_dict(state)  # the same images elsewhere
    (tmp_path / "i" / "3.txt").write_text("something else")
    feed = feed_of(ImagesData(folder=tmp_path / "i"))
    with pytest.raises(ValueError, match="the state is of other images than those of"):
        feed.load_state_dict(state)


def test_prompts_to_keep_come_beside_the_images(made: Path) -> None:
    """Each once an epoch, in an order of their own, with the context that they have alone."""
    contexts = {prompt: shared_parts(False).contexts(None)[[prompt]] for prompt in PROMPTS}

    def prompt_of(one: Context) -> str:
        return next(prompt for prompt, known in contexts.items() if equal(one, known))

    with closing(whole_feed("images, and prompts to keep", made)) as feed, closing(whole_feed("images", made)) as other:
        batches = take(feed, len(PROMPTS))
        for batch, plain in zip(batches, take(other, len(PROMPTS)), strict=True):
            assert same(replace(batch, kept=None), plain) and batch.kept is not None and batch.kept.batch == 3
    features = [batch.kept[row : row + 1] for batch in batches for row in range(3) if batch.kept is not None]
    found, epoch = [prompt_of(one) for one in features], len(PROMPTS)
    epochs = [found[start : start + epoch] for start in range(0, 3 * epoch, epoch)]
    assert all(sorted(one) == sorted(PROMPTS) for one in epochs) and epochs[0] != epochs[1]
    data = ImagesData(folder=made / "squares", keep=KeepConfig(prompts=made / "prompts.txt"))
    with closing(feed_of(data)) as feed:
        batch = next(feed)
        assert batch.kept is not None and batch.kept.batch == 1 == batch.context.batch
        assert f"with every 1 images 1 prompts to keep, of the {epoch} in " in feed.describe()


def test_contexts_of_prompts_to_keep_are_made_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    look = SharedContexts.__getitem__

    def looked(contexts: SharedContexts, captions: list[str]) -> Context:
        asked.extend(captions)
        return look(contexts, captions)

    monkeypatch.setattr(SharedContexts, "__getitem__", looked)
    found, counts = [], []
    for memory in (0, 1 << 30):
        asked.clear()
        keep = KeepConfig(prompts=made / "prompts.txt", share=0.6)
        with closing(feed_of(ImagesData(folder=made / "squares", memory=memory, keep=keep), batch=5)) as feed:
            found.append(take(feed, 10))
        counts.append(len(asked))
    assert all(map(same, *found))
    assert counts[0] >= 10 * 5 and counts[1] == 5 + len(set(PROMPTS))


def test_what_is_wrong_with_prompts_to_keep_is_said_of_them(made: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"a": "x", "b": "y"}\n')
    for path, message in ((tmp_path / "none.txt", "none.txt does not exist"), (tmp_path / "p.jsonl", "name one")):
        with pytest.raises(ValueError, match=rf"data\.keep: .*{message}"):
            feed_of(ImagesData(folder=made / "squares", keep=KeepConfig(prompts=path)))


def test_a_state_with_prompts_to_keep_goes_on_with_them_alone(made: Path, tmp_path: Path) -> None:
    kind = "images, and prompts to keep"
    with closing(whole_feed(kind, made)) as feed, closing(whole_feed("images", made)) as plain:
        assert feed.identity() != plain.identity()
        for one, other, message in ((feed, plain, "of a run with data.keep"), (plain, feed, "of a run without")):
            with pytest.raises(ValueError, match=message):
                other.load_state_dict(one.state_dict())
    (tmp_path / "others.txt").write_text("a star\n")
    others = ImagesData(folder=made / "images", keep=KeepConfig(prompts=tmp_path / "others.txt", share=0.6))
    with closing(feed_of(others, batch=5)) as feed, closing(whole_feed(kind, made)) as other:
        before = feed.state_dict()
        with pytest.raises(ValueError, match="the state is of other prompts than"):
            feed.load_state_dict(other.state_dict())
        assert feed.state_dict() == before


# Shapes


@torch.no_grad()
def test_shapes_are_the_stream(made: Path) -> None:
    parts, drawn = shared_parts(False), samples(1, 0, 8)
    target = parts.target_encoder(None, 512 * 512)
    with closing(whole_feed("shapes", made, rank=1, world_size=2)) as feed:
        assert feed.shape == (4, 16, 16)
        for places in ([2, 3], [6, 7]):
            batch = next(feed)
            captions, images = [drawn.captions[place] for place in places], drawn.images[places]
            context = parts.contexts(None)[captions]
            assert batch.latents is not None and torch.equal(batch.latents, parts.autoencoder.encode(images))
            assert equal(batch.context, context)
            assert batch.target_context is not None
            assert equal(batch.target_context, target(captions, images, context, None))


# Samples and references


def test_captions_for_samples_are_fixed_and_different(made: Path) -> None:
    unique = list(dict.fromkeys(PROMPTS))
    with closing(whole_feed("prompts", made)) as feed:
        assert feed.captions_for_samples(3) == unique[:3]
        assert feed.captions_for_samples(50) == unique
        assert equal(feed.contexts[unique[:2]], ContextCache(made / "contexts")[unique[:2]])
    with closing(whole_feed("images", made)) as feed:
        assert feed.captions_for_samples(9) == ["a red circle", "two shapes", "a small star"]
    with closing(whole_feed("shapes", made)) as feed, closing(whole_feed("shapes", made, seed=9)) as other:
        drawn = feed.captions_for_samples(40)
        assert len(set(drawn)) == 40 and other.captions_for_samples(40) == drawn
        assert feed.captions_for_samples(7) == drawn[:7]


@torch.no_grad()
def test_real_images_are_the_datas_own(made: Path) -> None:
    with closing(whole_feed("shapes", made)) as feed:
        drawn = feed.real_images(20)
        assert drawn is not None and drawn.shape == (20, 3, 64, 64)
        trained = samples(1, 0, 200).images
        assert not any(torch.equal(image, other) for image in drawn for other in trained)
    with closing(whole_feed("images", made)) as feed:
        squares = ImageFolder(made / "squares", area=64 * 64, factor=8)
        found = feed.real_images(4)
        assert found is not None and torch.equal(found, torch.stack([squares[n] for n in range(4)]))
        every = feed.real_images(100)
        assert every is not None and len(every) == 5
    with closing(whole_feed("prompts", made)) as feed:
        latents = TeacherCache(made / "anchors")[range(7)]["latents"]
        expected = shared_parts(False).autoencoder.decode(latents).clamp(-1, 1)
        found = feed.real_images(100)
        assert found is not None and found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
    with closing(feed_of(PromptsData(prompts=made / "prompts.txt"))) as feed:
        assert feed.real_images(5) is None


# What it says of itself


def test_describes_itself_without_loading_anything(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for loader in ("load_text_encoder", "load_autoencoder", "load_vision_encoder"):
        monkeypatch.setattr(parts_module, loader, forbidden)
    monkeypatch.setattr(parts_module, "CHEAP", 0)
    parts = parts_of(mini_folder())
    said = {kind: whole_feed(kind, made, parts=parts).describe() for kind in KINDS if "klein" not in kind}
    assert said["prompts"] == (
        f"7 prompts of {made / 'prompts.txt'}; contexts from {made / 'contexts'}; "
        f"images and anchors at sigma 0.75 of 4 x 8 x 6 from {made / 'anchors'}"
    )
    assert "contexts are made on the way" in said["prompts, contexts made here"]
    assert said["images"].startswith(f"8 images of {made / 'images'}: 5 of 64 x 64, 3 of 48 x 88; ")
    assert said["shapes"].startswith("drawn shapes, 64 x 64, stream 1; ")
    plain = PromptsData(prompts=made / "prompts.txt", teacher=made / "teacher")
    for wants, held in ((frozenset({"latents"}), "images of 4 x 8 x 6"), (frozenset(), "the size of 4 x 8 x 6")):
        assert feed_of(plain, parts=parts, wants=wants).describe().endswith(f"; {held} from {made / 'teacher'}")
    said["no images"] = feed_of(PromptsData(prompts=made / "prompts.txt"), parts=parts).describe()
    assert said["no images"].endswith("no images; noise of 4 x 16 x 16")


def test_its_identity_is_of_what_the_data_are(made: Path, tmp_path: Path) -> None:
    def identity(kind: str, data: Path, **more: Any) -> dict[str, Any]:
        with closing(whole_feed(kind, data, **more)) as feed:
            found: dict[str, Any] = json.loads(json.dumps(feed.identity()))
            return found

    shutil.copytree(made, tmp_path / "copy")
    for kind in KINDS:
        first = identity(kind, made)
        assert first["kind"] == kind.split(",")[0].split()[0]
        assert identity(kind, tmp_path / "copy", batch=3, rank=1, world_size=2) == first
        assert str(made) not in json.dumps(first)
    changed = tmp_path / "copy"
    (changed / "images" / "0.txt").write_text("another caption")
    assert identity("images", changed) != identity("images", made)
    one = PromptsData(prompts=made / "prompts.txt", teacher=made / "teacher")
    other = PromptsData(prompts=made / "prompts.txt", teacher=made / "anchors")
    with closing(feed_of(one)) as first_feed, closing(feed_of(other)) as second_feed:
        assert first_feed.identity() != second_feed.identity()
