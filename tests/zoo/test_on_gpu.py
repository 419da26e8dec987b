"""The zoo on a GPU: the same promises as on the CPU, by the CUDA kernels."""

from __future__ import annotations

import pytest
import torch

from twostep import ops
from twostep.zoo import AdapterBase, Discriminator, Teacher, TwoStepStudent, fuse

from .models import CASES, Batch, Case, backbone_of, batch_of, call_stock, copy_of, relative_error, stock_model

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def on_device(batch: Batch, dtype: torch.dtype = torch.float32) -> Batch:
    return Batch(batch.x.to(DEVICE, dtype), batch.sigma.to(DEVICE), batch.context.to(DEVICE, dtype))


def to_cpu(batch: Batch) -> Batch:
    return Batch(batch.x.cpu(), batch.sigma.cpu(), batch.context.to("cpu"))


def test_forward_and_input_gradient_are_stocks(case: Case) -> None:
    stock, batch = stock_model(case).to(DEVICE), on_device(batch_of(case))
    fused = fuse(copy_of(stock))
    assert ops.backend(batch.x) == DEVICE
    results = []
    for run in (
        lambda x: backbone_of(fused, case).velocity(x, batch.sigma, batch.context),
        lambda x: backbone_of(stock, case).velocity(x, batch.sigma, batch.context),
    ):
        x = batch.x.clone().requires_grad_(True)
        out = run(x)
        (gradient,) = torch.autograd.grad(out.sin().sum(), x)
        results.append((out, gradient))
    for ours, true in zip(*results, strict=True):
        assert relative_error(ours, true) <= 1e-4


def test_bfloat16_is_as_exact_as_stock(case: Case) -> None:
    low, batch = stock_model(case, dtype=torch.bfloat16), batch_of(case)
    batch.sigma = torch.full_like(batch.sigma, 0.5)
    exact = stock_model(case)
    for parameter, source in zip(exact.parameters(), low.parameters(), strict=True):
        parameter.data = source.data.double()
    rounded = batch.to(torch.bfloat16)
    with torch.no_grad():
        true = call_stock(exact, case, rounded.to(torch.float64))
        errors = []
        for model in (low, fuse(copy_of(low))):
            there = on_device(rounded, torch.bfloat16)
            found = backbone_of(model.to(DEVICE), case).velocity(there.x, there.sigma, there.context)
            errors.append(relative_error(found.cpu(), true))
    assert errors[1] <= 2 * errors[0]


def test_roles_on_one_base_sample_and_learn() -> None:
    case = CASES["z-image"]
    batch = on_device(batch_of(case))
    roles = AdapterBase(backbone_of(fuse(stock_model(case)), case).to(DEVICE))
    roles.backbone.enable_gradient_checkpointing()
    student = TwoStepStudent.from_teacher(roles, kind="adapters", rank=4)
    found = student.sample(batch.x, batch.context)
    there = to_cpu(batch)
    on_cpu = Teacher(backbone_of(fuse(stock_model(case)), case)).sample(there.x, there.context, sigmas=student.sigmas)
    assert relative_error(found.cpu(), on_cpu) <= 1e-4
    logits = Discriminator(roles.base)(student.one_jump(batch.x, batch.context), batch.sigma, batch.context)
    logits.sum().backward()
    # B is zero at first, so A's gradient is zero and B's is not
    assert all(p.grad is not None for p in student.first.parameters())
    assert all(p.grad is None for p in student.second.parameters())
