"""What an update of a distillation holds in memory, from shapes alone.

Roles are built and an update runs under torch's FakeTensorMode, so the plan is the code itself: the same forwards,
graphs, checkpoints and optimizer states, with no memory behind them. Two arrangements are compared:

    networks    the teacher, a copy a step, a fake score: trainable copies in float32 under autocast, frozen ones in
                `dtype`
    one base    the teacher frozen in `dtype`, and an adapter for each of the others

A generator update is Turbo++'s: both steps with the gradient through both, distribution matching (three forwards
without a graph) and the discriminator's logits on both clean predictions. A guidance update trains the fake score and
the heads. plan_scale.py runs the same on ranks.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import ops
from ..memory import LiveBytes
from .adapters import AdapterBase
from .backbone import Backbone
from .context import Context
from .discriminator import Discriminator
from .fake_score import FakeScore
from .fuse import fuse
from .loading import BESIDE, FAMILIES, config_of, family_of, shift_of
from .place import fetched, inside
from .student import TwoStepStudent
from .teacher import Teacher
from .z_image.backbone import ZImageBackbone

ARRANGEMENTS = ("networks", "one base")

# Published configurations, by the defaults of diffusers' classes and methods.md's facts.
MODELS: dict[str, dict[str, Any]] = {
    "z-image": {"_class_name": "ZImageTransformer2DModel"},
    "klein-4b": {
        "_class_name": "Flux2Transformer2DModel",
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "klein-9b": {
        "_class_name": "Flux2Transformer2DModel",
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
        "guidance_embeds": False,
    },
}


@dataclass(frozen=True)
class Setting:
    """What is planned: the size of latents, the batch, and how the update is run."""

    height: int = 128  # of the latents
    width: int = 128
    batch: int = 1
    caption: int = 512  # tokens
    arrangement: str = "one base"
    mode: str = "recompute"
    checkpointing: bool = True
    dtype: torch.dtype = torch.bfloat16
    rank: int = 64
    optimizer: bool = True  # AdamW's two moments
    ema: bool = False  # a moving average of the student
    accumulate: int = 1  # batches of an update: with more than one, gradients are there already when a batch begins


@dataclass
class Roles:
    teacher: Teacher
    student: TwoStepStudent
    fake: FakeScore
    discriminator: Discriminator
    networks: list[Backbone]  # each once: what is divided among ranks

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        return {
            "student": list(self.student.trainable_parameters()),
            "fake score": list(self.fake.trainable_parameters()),
            "discriminator": list(self.discriminator.trainable_parameters()),
        }


@dataclass
class Plan:
    setting: Setting
    parameters: dict[str, int] = field(default_factory=dict)  # of each role; the base's stand at the teacher
    trainable: dict[str, int] = field(default_factory=dict)
    held: int = 0  # bytes between updates: weights and optimizer states
    peaks: dict[str, int] = field(default_factory=dict)  # bytes at the worst moment of each update

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def make_backbone(config: Mapping[str, Any], dtype: torch.dtype, *, fused: bool = True, **keywords: Any) -> Backbone:
    """A backbone of this configuration, its weights as they come; under FakeTensorMode without any."""
    stock, kind = FAMILIES[config["_class_name"]]
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    model = stock(**known)
    if fused:
        fuse(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return kind(model, **keywords)


def backbone_like(
    path: str | Path, *, dtype: torch.dtype, device: Any = "cpu", fused: bool = True, subfolder: str = "transformer"
) -> Backbone:
    """What `load_backbone` gives, from configurations alone: for FakeTensorMode, which has one device as good as
    another."""
    folder = fetched(path, "load_backbone", [inside(subfolder, "config.json")], BESIDE)
    config = config_of(folder, subfolder)
    _, kind = family_of(path, config)
    return make_backbone(config, dtype, fused=fused, **(shift_of(folder, subfolder) if kind is ZImageBackbone else {}))


def make_roles(config: Mapping[str, Any], setting: Setting) -> Roles:
    backbone = make_backbone(config, setting.dtype).requires_grad_(False)
    if setting.checkpointing:
        backbone.enable_gradient_checkpointing()
    if setting.arrangement == "one base":
        base = AdapterBase(backbone)
        student = TwoStepStudent.from_teacher(base, kind="adapters", rank=setting.rank)
        fake = FakeScore.from_teacher(base, rank=setting.rank)
        return Roles(Teacher(base.base), student, fake, Discriminator(base.base), [base.backbone])
    student, fake = TwoStepStudent.from_teacher(backbone), FakeScore.from_teacher(backbone)
    trained = [*student.distinct_networks(), fake.network]
    for network in trained:
        for parameter in network.parameters():
            parameter.data = parameter.data.float()
    return Roles(Teacher(backbone), student, fake, Discriminator(backbone), [backbone, *trained])


def _noised(x: Tensor, sigma: float) -> Tensor:
    return (1 - sigma) * x + sigma * torch.randn_like(x)


def generator_update(roles: Roles, setting: Setting, noise: Tensor, context: Context, negative: Context) -> None:
    """The generator's forward and backward, with the terms and networks of Turbo++."""

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = _noised(x, 0.5)
            real = roles.teacher.clean(seen, 0.5, context, guidance=4.0, negative=negative)
            fake = roles.fake.clean(seen, 0.5, context)
            direction = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
        logits = roles.discriminator(_noised(x, 0.5), 0.5, context)
        matching = 0.5 * (x - (x - direction).detach()).square().mean()
        return matching + nn.functional.softplus(-logits).mean()

    student = roles.student
    ops.two_step_backward(
        lambda z: student.velocity(0, z, context),
        lambda z: student.velocity(1, z, context),
        noise,
        student.sigmas,
        loss,
        loss,
        inherit=0.1,
        mode=setting.mode,
    )


def guidance_update(roles: Roles, noise: Tensor, context: Context) -> None:
    """The fake score's denoising loss on the student's samples, then the heads' loss on real and fake."""
    x = roles.student.sample(noise, context)
    eps = torch.randn_like(x)
    velocity = roles.fake.velocity(0.5 * x + 0.5 * eps, 0.5, context)
    (velocity.float() - (eps - x)).square().mean().backward()
    real, fake = (roles.discriminator(_noised(image, 0.5), 0.5, context) for image in (noise, x))
    (nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean()).backward()


def _with_states(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW after a step that moved nothing."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def run_updates(
    roles: Roles,
    setting: Setting,
    phase: Callable[[str], AbstractContextManager[None]],
    average: Callable[[list[nn.Parameter]], None] = lambda parameters: None,
) -> None:
    """One update of each kind, with the optimizers' states there already; `average` sees the gradients before the
    step."""
    backbone = roles.teacher.backbone
    noise = torch.randn(setting.batch, backbone.channels, setting.height, setting.width)
    width = backbone.context_width
    context, negative = (Context(torch.randn(n, setting.caption, width)) for n in (setting.batch, 1))
    groups = roles.trainable()
    trained = {"generator": groups["student"], "guidance": [*groups["fake score"], *groups["discriminator"]]}
    optimizers = {name: _with_states(parameters) for name, parameters in trained.items()} if setting.optimizer else {}
    average_of = trained["generator"] if setting.ema else []
    held = [parameter.detach().clone() for parameter in average_of]
    mixed = setting.arrangement == "networks" and setting.dtype != torch.float32
    for name, parameters in trained.items():
        if setting.accumulate > 1:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        with phase(name):
            with torch.autocast("cpu", setting.dtype) if mixed else nullcontext():
                if name == "generator":
                    generator_update(roles, setting, noise, context, negative)
                else:
                    guidance_update(roles, noise, context)
            average(parameters)
            if name in optimizers:
                optimizers[name].step()
            for parameter in itertools.chain(*trained.values()):
                parameter.grad = None
    with phase("between updates"):  # weights, optimizer states and an average are what is left
        pass
    del held


def count_parameters(roles: Roles, result: Plan) -> None:
    result.parameters = {"teacher": sum(p.numel() for p in roles.teacher.backbone.parameters())}
    for name, parameters in roles.trainable().items():
        result.parameters[name] = result.trainable[name] = sum(p.numel() for p in parameters)


def caption_room(config: Mapping[str, Any]) -> int:
    """Tokens of a caption: 512, to which the pipelines of both families cut one, or what a model has positions for."""
    return min(512, context_room(config, 512))


def context_room(config: Mapping[str, Any], tokens: int) -> int:
    """So many tokens of a context, or what a model has positions for (Z-Image: behind them stand one position and the
    image's frame)."""
    positions = config.get("axes_lens")
    return tokens if positions is None else min(tokens, (positions[0] - 2) // 32 * 32)


def check_arrangement(setting: Setting) -> None:
    if setting.arrangement not in ARRANGEMENTS:
        raise ValueError(
            f"plan: arrangement is {setting.arrangement!r}, expected one of {', '.join(map(repr, ARRANGEMENTS))}"
        )


def plan(config: Mapping[str, Any], setting: Setting) -> Plan:
    """Runs the updates on fake tensors and counts."""
    check_arrangement(setting)
    result = Plan(setting)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as count:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copy.deepcopy looks
        roles = make_roles(config, setting)
        count_parameters(roles, result)
        run_updates(roles, setting, count.phase)
        result.peaks = dict(count.peaks)
        result.held = result.peaks.pop("between updates")
    return result
