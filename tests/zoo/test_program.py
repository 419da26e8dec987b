"""Networks as programs of tensors alone: what the backbone computes, at sizes that the example did not have."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.models import CASES, backbone_of, fused_backbone, stock_model
from twostep import ops
from twostep.zoo import AdapterBase, Context, Student, program

NAMES = ["z-image", "z-image, odd width, no refiners, nothing to pad", "z-image, no norm of queries and keys", "flux2"]
NAMES += ["flux2, odd width, guidance input"]
SIZES = ((2, 4, 6, 64), (1, 8, 4, 32), (3, 5, 3, 96))  # images, rows, columns, tokens of captions


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_network_is_the_backbone_at_any_size(name: str) -> None:
    backbone = fused_backbone(CASES[name])
    traced, factor = program.network(backbone), backbone.latent_factor
    batch = torch.export.Dim("batch", min=1, max=program.BATCH)
    torch.manual_seed(0)
    with torch.no_grad():
        first = traced.example(2, 4 * factor, 6 * factor, 64)
        exported = torch.export.export(traced, (), first, dynamic_shapes=traced.dims(batch), strict=False).module()
        for images, rows, columns, tokens in SIZES:
            given = traced.example(images, rows * factor, columns * factor, tokens)
            context = Context(given["features"], lengths=given.get("lengths"))
            expected = backbone.velocity(given["x"], given["sigma"], context)
            for found in (traced(**given), exported(**given)):
                assert (found - expected).norm() / expected.norm() <= 1e-6


def test_all_steps_are_the_students_sample() -> None:
    case = CASES["z-image"]
    first, second = fused_backbone(case), fused_backbone(case, seed=1)
    for networks in ((first, second), (first, first)):
        student = Student(networks, (1.0, 0.75, 0.0))
        steps = program.Steps(student)
        given = steps.example(2, 8, 12, 64)
        expected = student.sample(given["noise"], Context(given["features"], lengths=given["lengths"]))
        with torch.no_grad():
            assert (steps(**given) - expected).norm() / expected.norm() <= 1e-6
        assert len(list(steps.parameters())) == len(list(first.parameters())) * len(set(networks))


def test_decompositions_leave_no_operator_of_this_library() -> None:
    for name in ("z-image", "flux2"):
        traced = program.network(fused_backbone(CASES[name]))
        batch = torch.export.Dim("batch", min=1, max=program.BATCH)
        torch.manual_seed(0)
        given = traced.example(2, 8, 12, 64)
        with torch.no_grad():
            exported = torch.export.export(traced, (), given, dynamic_shapes=traced.dims(batch), strict=False)
            plain = exported.run_decompositions(ops.decompositions())
            assert any("twostep" in str(node.target) for node in exported.graph.nodes)
            assert not [node for node in plain.graph.nodes if "twostep" in str(node.target)]
            expected, found = exported.module()(**given), plain.module()(**given)
        assert (found - expected).norm() / expected.norm() <= 1e-5


@pytest.mark.parametrize("name", ["z-image", "flux2"])
def test_everything_is_where_the_network_is(name: str) -> None:
    """On the meta device, which computes with nothing that lies elsewhere."""
    backbone = fused_backbone(CASES[name])
    backbone.model.to("meta")
    traced = program.network(backbone)
    assert traced(**traced.example(2, 8, 12, 64)).device.type == "meta"


def test_what_has_no_program_is_explained() -> None:
    case = CASES["z-image"]
    with pytest.raises(TypeError, match="stock diffusers, whose rotary tables are complex: fuse it first"):
        program.network(backbone_of(stock_model(case), case))
    with pytest.raises(TypeError, match="merge it into the base's weights first"):
        program.network(AdapterBase(fused_backbone(case)).add("step_1", rank=2))
