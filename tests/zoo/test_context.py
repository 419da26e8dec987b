"""A batch of contexts: joined, cut and moved without losing or mixing anything."""

from __future__ import annotations

import pytest
import torch

from twostep.zoo import Context


def example(lengths: list[int], seed: int = 0, **more: object) -> Context:
    features = torch.randn(len(lengths), max(lengths), 6, generator=torch.Generator().manual_seed(seed))
    return Context(features, torch.tensor(lengths), **more)


def rows(context: Context) -> list[torch.Tensor]:
    return [f[:n] for f, n in zip(context.features, context.token_lengths.tolist(), strict=True)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("index", [slice(1, 3), [2, 0], torch.tensor([1, 1, 2]), [-1, 0]])
def test_indexing_takes_samples_and_cuts_padding(index: object) -> None:
    context = example([3, 7, 5], references=(torch.randn(3, 4, 2, 2),))
    part = context[index]
    wanted = list(range(3))[index] if isinstance(index, slice) else [int(i) for i in index]
    assert same(rows(part), [rows(context)[i] for i in wanted])
    assert part.features.shape[1] == max(len(rows(context)[i]) for i in wanted)
    assert torch.equal(part.references[0], context.references[0][wanted])


def test_joining_pads_to_the_longest() -> None:
    a, b = example([3, 2]), example([7], seed=1)
    joined = Context.cat([a, b])
    assert same(rows(joined), rows(a) + rows(b))
    even = Context.cat([Context(torch.zeros(1, 4, 6)), Context(torch.ones(2, 4, 6))])
    assert even.lengths is None and even.batch == 3
    uneven = Context.cat([Context(torch.zeros(1, 4, 6)), Context(torch.ones(1, 2, 6))])
    assert uneven.token_lengths.tolist() == [4, 2]
    assert Context.cat([a]) is a


def test_segments_survive_joining() -> None:
    a = Context(torch.randn(1, 5, 6), torch.tensor([[2, 3]]))
    b = Context(torch.randn(1, 4, 6), torch.tensor([[1, 2]]))
    assert Context.cat([a, b]).lengths.tolist() == [[2, 3], [1, 2]]
    assert Context.cat([a, b]).token_lengths.tolist() == [5, 3]


def test_repeating_keeps_neighbours_together() -> None:
    context = example([3, 7])
    assert same(rows(context.repeat(2)), [rows(context)[i] for i in (0, 0, 1, 1)])


def test_moving_leaves_lengths_on_the_cpu() -> None:
    moved = example([3, 7], references=(torch.randn(2, 4, 2, 2),)).to("meta", torch.bfloat16)
    assert moved.features.dtype == moved.references[0].dtype == torch.bfloat16
    assert moved.features.is_meta and moved.lengths.device.type == "cpu"


def test_contexts_of_two_encoders_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"two encoders cannot share a batch: 'a' and 'b'"):
        Context.cat([example([3], encoder="a"), example([3], encoder="b")])
    with pytest.raises(ValueError, match="two shapes cannot share a batch"):
        Context.cat([example([3]), Context(torch.zeros(1, 3, 7))])
    with pytest.raises(ValueError, match="two shapes"):
        Context.cat([example([3]), example([3], references=(torch.zeros(1, 4, 2, 2),))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4),), r"features have shape \[3, 4\]"),
        ((torch.zeros(2, 4, 1), torch.tensor([4])), r"lengths have shape \[1\], expected \[2\]"),
        ((torch.zeros(2, 4, 1), torch.tensor([4, 5])), r"lengths \[4, 5\] do not fit features of 4 tokens"),
        ((torch.zeros(2, 4, 1), torch.tensor([4, 0])), r"every length is at least 1"),
        ((torch.zeros(1, 4, 1), torch.tensor([[3, 2]])), r"add up to at most 4"),
        ((torch.zeros(2, 4, 1), torch.tensor([4.0, 2.0])), r"lengths are torch\.float32"),
        ((torch.zeros(2, 4, 1), None, (torch.zeros(1, 2, 2, 2),)), r"references hold .* a batch of 2"),
    ],
)
def test_contexts_that_make_no_sense_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Context(*arguments)


def test_a_mask_takes_what_it_is_true_for() -> None:
    context = example([3, 7, 5])
    for mask in ([True, False, True], torch.tensor([True, False, True])):
        assert same(rows(context[mask]), [rows(context)[i] for i in (0, 2)])
    for wrong in ([True, False], torch.tensor([0.0, 2.0]), torch.zeros(1, 1, dtype=torch.int64)):
        with pytest.raises(TypeError, match="expected a slice, whole numbers, or a mask of 3 booleans"):
            context[wrong]
    assert context[[]].batch == 0
    with pytest.raises(TypeError, match="lengths are list"):
        Context(torch.zeros(2, 5, 4), lengths=[5, 5])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there are no contexts"):
        Context.cat([])


def test_one_index_is_ambiguous() -> None:
    with pytest.raises(TypeError, match=r"names one sample; take a batch of one with \[0 : 0 \+ 1\]"):
        example([3])[0]


def test_captions_of_one_segment_join_however_their_lengths_are_written() -> None:
    """[B, 1], as the omni encoder writes it without images, beside [B] and none at all."""
    segmented, plain, whole = (
        Context(torch.randn(1, 5, 6), torch.tensor([[3]])),
        example([2]),
        Context(torch.zeros(1, 4, 6)),
    )
    assert Context.cat([segmented, plain, whole]).lengths.tolist() == [[3], [2], [4]]
    assert Context.cat([whole, segmented, plain]).lengths.tolist() == [4, 3, 2]
