"""One frozen base, several adapters: the teacher is the base alone, every other role is the base with an adapter of its
own.

    roles = AdapterBase(load_backbone(path))
    teacher, first, fake = roles.base, roles.add("step_1"), roles.add("fake_score")

LoRA layers are PEFT's. All of them look at one list, the names of the adapters in use, so switching is one assignment.
Which adapter runs is bound to the call, not to a mode of the model: each role's forward switches its own adapter on and
back off, and a checkpointed block remembers the adapter of its forward for the recomputation in backward, whatever ran
in between. That is so for `enable_gradient_checkpointing`; a checkpoint of one's own around a block recomputes it with
every adapter off. The list is one for all threads, so roles of one base take turns. An adapter's parameters are trained
or frozen by `requires_grad_` of its role; PEFT's `set_adapter`, which would switch the others' gradients off, is not
used.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import _disable_current_modes

from .backbone import Backbone, Level, need_backbone
from .context import Context
from .encoders import fingerprint

# The layers that D-OPSD trains (q, k, v, out and the feed-forward), by the names of each family: regular expressions
# for PEFT's target_modules. In FLUX.2 `attn.to_out` is a layer in single blocks and a list in double blocks.
TARGETS: dict[str, str] = {
    "z-image": r".*\.(to_q|to_k|to_v|to_out\.0|w1|w2|w3)",
    "flux2": r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|linear_in|linear_out"
    r"|to_qkv_mlp_proj)|single_transformer_blocks\.\d+\.attn\.to_out",
}


class Switch:
    """The list of adapters in use that every LoRA layer of a model shares."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._depth, self._thread = 0, 0

    def rewire(self, model: nn.Module) -> None:
        """Lets every LoRA layer look at this list; again after PEFT has added layers."""
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module._active_adapter = self.names

    @contextlib.contextmanager
    def on(self, name: str | None) -> Iterator[None]:
        before, counted = list(self.names), self._enter()
        self.names[:] = [] if name is None else [name]
        try:
            yield
        finally:
            self.names[:] = before
            if counted:
                self._depth -= 1

    def _enter(self) -> bool:
        """Whether it was counted: what is compiled is not, since its side effects may come in parts."""
        if torch.compiler.is_compiling():
            return False
        mine = threading.get_ident()
        if self._depth and self._thread != mine:
            raise RuntimeError(
                "AdapterBase: two threads use roles of one base at once, and all of them look at one list of "
                "adapters: let them take turns (a lock around each call), or load a base for each"
            )
        self._thread = mine
        self._depth += 1
        return True

    def bound(self, block: Any) -> Any:
        """The block with today's adapter, to be run again later."""
        name = self.names[0] if self.names else None

        @functools.wraps(block.forward if isinstance(block, nn.Module) else block)
        def run(*inputs: Any) -> Any:
            with self.on(name):
                return block(*inputs)

        return run


class AdapterView(Backbone):
    """A backbone with one adapter switched on while it runs. Its parameters are the adapter's; the base's for None."""

    _base: Backbone
    _switch: Switch
    adapter: str | None
    base_weights: str | None  # their fingerprint; None for shapes without values

    def __init__(self, base: Backbone, switch: Switch, adapter: str | None, base_weights: str | None) -> None:
        nn.Module.__init__(self)
        # Not registered as submodules: several views share one base, and none owns its parameters.
        self.__dict__.update(_base=base, _switch=switch, adapter=adapter, base_weights=base_weights, model=base.model)
        self.family, self.latent_factor = base.family, base.latent_factor

    @property
    def base(self) -> Backbone:
        return self._base

    @property
    def channels(self) -> int:
        return self._base.channels

    @property
    def context_width(self) -> int:
        return self._base.context_width

    @property
    def width(self) -> int:
        return self._base.width

    def blocks(self) -> list[nn.Module]:
        return self._base.blocks()

    def default_shift(self, height: int, width: int, steps: int) -> float:
        return self._base.default_shift(height, width, steps)

    def forward(
        self, x: Tensor, sigma: Tensor | float | Level, context: Context, taps: Sequence[int] | None = None
    ) -> Tensor | list[Tensor]:
        learns = self.adapter is not None and torch.is_grad_enabled()
        if learns and any(isinstance(block, CheckpointWrapper) for block in self.blocks()):
            raise ValueError(
                "AdapterView: a block is inside torch's checkpoint_wrapper, whose recomputation would run without the "
                "adapter: take the wrapper off and call enable_gradient_checkpointing() of the role"
            )
        with self._switch.on(self.adapter):
            return self._base(x, sigma, context, taps)

    def _predict(self, x: Tensor, sigma: Tensor, context: Context, taps: Sequence[int] | None) -> Tensor | list[Tensor]:
        return self._base._predict(x, sigma, context, taps)

    def _owns(self, name: str) -> bool:
        if self.adapter is None:
            return ".lora_" not in name
        return ".lora_" in name and name.split(".")[-2] == self.adapter

    # A module that holds a view (Student, FakeScore, DDP) finds the adapter's parameters here, as it finds any
    # module's. They are read from the base each time, since FSDP puts others in their place; the setter is for
    # nn.Module.__init__.
    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        return {name: parameter for name, parameter in self.model.named_parameters() if self._owns(name)}

    @_parameters.setter
    def _parameters(self, _: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        """A parameter's name leads through the base's modules: get_parameter, torch.func.functional_call."""
        model = self.__dict__.get("model")
        if model is not None and name in model._modules:
            return model._modules[name]
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> AdapterView:
        """Switches the dropout of this adapter alone."""
        super().train(mode)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and self.adapter in module.lora_dropout:
                module.lora_dropout[self.adapter].train(mode)
        return self

    def _tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by PEFT's names, without the adapter's own name in them; sharded where FSDP shards them."""
        for module in self._base.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a root stays whole after a forward, and what is written into it then is lost
        return {self._neutral(name): parameter for name, parameter in self.named_parameters()}

    def _neutral(self, name: str) -> str:
        if self.adapter is None:
            return name
        *path, _, tensor = name.split(".")
        return ".".join([*path, tensor])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, parameter in self._tensors().items():
            destination[prefix + name] = parameter if keep_vars else parameter.detach()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        missing: list[str] = []
        unexpected: list[str] = []
        errors: list[str] = []
        self._load_from_state_dict(state_dict, "", {}, strict, missing, unexpected, errors)
        if strict and (missing or unexpected):
            errors.append(
                f"adapter {self.adapter!r}: the state does not fit: {len(missing)} tensors are missing {missing[:2]}, "
                f"{len(unexpected)} are unexpected {unexpected[:2]}"
            )
        if errors:
            raise ValueError("; ".join(errors[:4]))
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {prefix + name: parameter for name, parameter in self._tensors().items()}
        given = {name for name in state_dict if name.startswith(prefix)}
        missing_keys += sorted(own.keys() - given)
        unexpected_keys += sorted(given - own.keys())
        for name in sorted(own.keys() & given):
            parameter, value = own[name], state_dict[name]
            if parameter.shape != value.shape:
                error_msgs.append(
                    f"adapter {self.adapter!r}: {name} has shape {list(value.shape)}, expected "
                    f"{list(parameter.shape)}: another rank or another model"
                )
                continue
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            with torch.no_grad():
                parameter.copy_(value)


class AdapterBase:
    """A frozen backbone that adapters are added to. The backbone's own parameters never get a gradient.

    To move or to shard, move or shard `backbone`; a view holds its adapter alone. With FSDP2 give
    reshard_after_forward=True for the root too: some roles run forward only, and would leave the root's parameters
    whole and `parameters()` of the others without their gradients.
    """

    def __init__(self, backbone: Backbone) -> None:
        need_backbone("AdapterBase", backbone)
        if hasattr(backbone.model, "adapter_switch"):
            raise ValueError(
                "AdapterBase: the backbone belongs to an AdapterBase already: add the adapters to that one"
            )
        if any(isinstance(module, BaseTunerLayer) for module in backbone.model.modules()):
            raise ValueError("AdapterBase: the backbone has LoRA layers already; load it anew, or merge them first")
        self.backbone = backbone.requires_grad_(False)
        self._switch = Switch()
        backbone.model.adapter_switch = self._switch
        # Before there are adapters, and before anything is divided among ranks.
        only_shapes = any(one.is_meta or isinstance(one, FakeTensor) for one in backbone.parameters())
        self.base_weights = None if only_shapes else fingerprint.weights(backbone.model)
        self._views: dict[str, AdapterView] = {}

    @property
    def base(self) -> AdapterView:
        """The base alone: every adapter off."""
        return AdapterView(self.backbone, self._switch, None, self.base_weights)

    @property
    def adapters(self) -> dict[str, AdapterView]:
        return dict(self._views)

    def add(
        self,
        name: str,
        *,
        rank: int = 64,
        alpha: float | None = None,
        targets: str | Sequence[str] | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> AdapterView:
        """A new adapter as a role of its own; it begins as a copy of the base (B is zero).

        alpha is twice the rank where it is not given. dtype is that of the adapter's parameters: float32 keeps master
        weights under a bfloat16 base; autocast decides what they compute in.
        """
        if not name.isidentifier() or name in self._views:
            taken = f" that is not one of {sorted(self._views)}" if self._views else ""
            raise ValueError(f"AdapterBase: name is {name!r}, expected letters, digits and underscores{taken}")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"AdapterBase: rank is {rank!r}, expected a whole number of at least 1")
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"AdapterBase: alpha is {alpha}, expected a number above 0")
        model = self.backbone.model
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules=TARGETS[self.backbone.family] if targets is None else targets,
            lora_dropout=dropout,
        )
        trained = {n: p.requires_grad for n, p in model.named_parameters()}
        # On the meta device, outside the modes in which `twostep plan` calls this: PEFT would move its layers about.
        with warnings.catch_warnings(), _disable_current_modes():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
        model._hf_peft_config_loaded = True  # diffusers' own mark, which its saving and loading of adapters go by
        self._switch.rewire(model)
        view = AdapterView(self.backbone, self._switch, name, self.base_weights)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and name in module.lora_A:
                device = module.get_base_layer().weight.device
                for layer in (module.lora_A[name], module.lora_B[name]):
                    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=dtype, device=device))
                nn.init.kaiming_uniform_(module.lora_A[name].weight, a=math.sqrt(5), generator=generator)
        for n, parameter in model.named_parameters():  # PEFT has just switched the other adapters' gradients off
            parameter.requires_grad_(trained.get(n, view._owns(n)))
        self._views[name] = view
        return view
