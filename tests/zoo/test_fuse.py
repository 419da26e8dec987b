"""What fuse() promises to people who have a diffusers model, an adapter, a compiler or a checkpoint around it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    ZImagePipeline,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor
from peft import LoraConfig
from torch import Tensor, nn

from twostep.zoo import fuse, is_fused, unfuse
from twostep.zoo.adapters import TARGETS
from twostep.zoo.miniature.model import weights_folder

from .models import (
    CASES,
    Case,
    backbone_of,
    batch_of,
    call_stock,
    copy_of,
    flux2,
    fused_backbone,
    relative_error,
    stock_model,
    z_image,
)

BOTH = pytest.mark.parametrize("name", ["z-image", "flux2"])


@pytest.mark.parametrize("way", ["hook", "hook of every module", "replaced forward", "replaced forward of the class"])
def test_what_somebody_keeps_of_a_feed_forward_is_not_written_over(
    way: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Without autograd the gate's memory is used again, but not where a hook or a wrapper has seen it."""
    case = CASES["z-image"]
    model = fuse(stock_model(case))
    feed_forward = model.layers[0].feed_forward
    kept: list[Tensor] = []
    seen: list[Tensor] = []

    def keep(module: nn.Module, _: Any, out: Tensor) -> None:
        if module is feed_forward.w1:
            kept.append(out)

    original = nn.Linear.forward

    def keeping(module: nn.Module, x: Tensor) -> Tensor:
        out = original(module, x)
        keep(module, x, out)
        return out

    if way == "hook":
        feed_forward.w1.register_forward_hook(keep)
    elif way == "hook of every module":
        request.addfinalizer(nn.modules.module.register_module_forward_hook(keep).remove)
    elif way == "replaced forward":
        feed_forward.w1.forward = lambda x: keeping(feed_forward.w1, x)
    else:
        monkeypatch.setattr(nn.Linear, "forward", keeping)
    feed_forward.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        call_stock(model, case, batch_of(case))
        assert torch.equal(kept[0], nn.functional.linear(seen[0], feed_forward.w1.weight))


def test_nothing_changes_without_autograd() -> None:
    case = CASES["z-image"]
    model, batch = fuse(stock_model(case)), batch_of(case)
    with_graph = call_stock(model, case, batch)
    with torch.no_grad():
        assert torch.equal(call_stock(model, case, batch), with_graph)


def add_lora(model: nn.Module, case: Case, seed: int = 3) -> None:
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[case.family]))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)


def loss_and_gradients(model: nn.Module, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    out = call_stock(model, case, batch_of(case))
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    model.zero_grad()
    loss.backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@BOTH
@pytest.mark.parametrize("order", ["fuse, then LoRA", "LoRA, then fuse"])
def test_lora_before_or_after(name: str, order: str) -> None:
    case = CASES[name]
    stock = stock_model(case)
    model = copy_of(stock)
    add_lora(stock, case)
    if order == "fuse, then LoRA":
        fuse(model)
        add_lora(model, case)
    else:
        add_lora(model, case)
        fuse(model)
    true, true_gradients = loss_and_gradients(stock, case)
    plain = call_stock(stock_model(case), case, batch_of(case))
    value, gradients = loss_and_gradients(model, case)
    assert relative_error(plain, true) > 1e-3  # the adapter does something
    assert relative_error(value, true) <= 1e-5
    assert gradients.keys() == true_gradients.keys() and all(".lora_" in n for n in gradients)
    for n, g in true_gradients.items():
        assert relative_error(gradients[n], g) <= 1e-5, n


def test_the_lora_scale_of_a_call_is_honoured() -> None:
    case = CASES["z-image"]
    model, batch = stock_model(case), batch_of(case)
    add_lora(model, case)
    captions = [f[:n] for f, n in zip(batch.context.features, batch.context.lengths.tolist(), strict=True)]

    def call(scale: float) -> Tensor:
        images = list(batch.x.unsqueeze(2).unbind(0))
        kwargs = {"scale": scale}
        with torch.no_grad():
            out = model(images, batch.sigma, captions, joint_attention_kwargs=kwargs, return_dict=False)[0]
        return torch.stack(out)

    true = {scale: call(scale) for scale in (1.0, 0.3)}
    assert relative_error(true[0.3], true[1.0]) > 1e-3
    fuse(model)
    for scale, expected in true.items():
        assert relative_error(call(scale), expected) <= 1e-5


@BOTH
def test_what_a_fused_model_saves_loads_in_stock_diffusers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, batch = stock_model(case), batch_of(case)
    with torch.no_grad():
        true = call_stock(model, case, batch)
    fuse(model).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = type(stock_model(case)).from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("diffusers.")
    with torch.no_grad():
        assert torch.equal(call_stock(loaded, case, batch), true)


@pytest.mark.parametrize("name", ["z-image", "z-image omni, two references with vision", "flux2, masked captions"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    case = CASES[name]
    model = fuse(stock_model(case))
    batch, results = batch_of(case), []
    for on in (False, True):
        backbone = backbone_of(model, case)
        backbone.enable_gradient_checkpointing(on)
        calls: list[int] = []
        hooks = [b.register_forward_pre_hook(lambda *_, c=calls: c.append(1)) for b in backbone.blocks()]
        model.zero_grad()
        backbone.velocity(batch.x, batch.sigma, batch.context).square().sum().backward()
        for hook in hooks:
            hook.remove()
        assert len(calls) == len(backbone.blocks()) * (2 if on else 1)
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for n, g in results[0].items():
        assert torch.equal(results[1][n], g), n


def block_inputs(case: Case) -> tuple[list[nn.Module], list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The blocks of a fused model, one of each class, and what they are called with."""
    backbone, batch = fused_backbone(case), batch_of(case)
    blocks = list({type(block): block for block in backbone.blocks()}.values())
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hooks = [block.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True) for block in blocks]
    with torch.no_grad():
        backbone.velocity(batch.x, batch.sigma, batch.context)
    for hook in hooks:
        hook.remove()
    return blocks, seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z-image", "z-image omni", "flux2"])
def test_a_block_compiles_in_one_graph(name: str) -> None:
    """fullgraph=True: a graph break is an error. Forward and gradients are the uncompiled block's."""
    blocks, calls = block_inputs(CASES[name])
    for block, (args, kwargs) in zip(blocks, calls, strict=True):
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        results = []
        for run in (block, compiled):
            block.zero_grad()
            out = run(*args, **kwargs)
            first = out if isinstance(out, Tensor) else torch.cat(out, dim=1)
            first.sin().sum().backward()
            results.append((first.detach(), {n: p.grad.clone() for n, p in block.named_parameters()}))
        (a, a_gradients), (b, b_gradients) = results
        assert relative_error(b, a) <= 1e-6
        for n, g in a_gradients.items():
            assert relative_error(b_gradients[n], g) <= 1e-5, n


@pytest.fixture
def default_attention() -> Iterator[None]:
    """set_attention_backend changes diffusers' default for every model of the process."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@BOTH
@pytest.mark.usefixtures("default_attention")
def test_attention_backends_go_by_diffusers_names(name: str) -> None:
    case = CASES["z-image, even captions" if name == "z-image" else name]
    backbone, batch = fused_backbone(case), batch_of(case)

    def run() -> Tensor:
        with torch.no_grad():
            return backbone.velocity(batch.x, batch.sigma, batch.context)

    true = run()
    backbone.model.set_attention_backend("_native_math")
    assert relative_error(run(), true) <= 1e-5
    with pytest.raises(ValueError, match="must be one of"):
        backbone.model.set_attention_backend("no such backend")
    # A backend that needs a GPU is really asked: it refuses these tensors.
    backbone.model.set_attention_backend("_native_cudnn")
    with pytest.raises(RuntimeError):
        run()


def test_short_bfloat16_attention_in_training_is_still_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detour of zoo/attention.py, as processors with AMX take it, against diffusers' dispatch in float64, with and
    without a mask. Other processors do not take it."""
    from twostep.zoo import attention
    from twostep.zoo.attention import attend

    processor = Flux2AttnProcessor()
    q, k, v = (torch.randn(2, 33, 3, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    for mask in (None, torch.arange(33).expand(2, -1) < torch.tensor([[20], [33]])):
        true = attend(q.double(), k.double(), v.double(), mask, processor)
        stock = attend(q, k, v, mask, processor)  # no gradient: dispatch
        monkeypatch.setattr(attention, "FAST_BFLOAT16", False)
        assert torch.equal(attend(q.clone().requires_grad_(), k, v, mask, processor), stock)
        monkeypatch.setattr(attention, "FAST_BFLOAT16", True)
        ours = attend(q.clone().requires_grad_(), k, v, mask, processor)
        assert ours.grad_fn is not None and not torch.equal(ours, stock)
        assert relative_error(ours, true) <= 2 * relative_error(stock, true)


def test_a_mixed_batch_of_sizes_falls_back_to_stocks_assembly() -> None:
    case = CASES["z-image"]
    model = stock_model(case)
    images = [torch.randn(4, 1, 8, 12), torch.randn(4, 1, 4, 6)]
    captions, t = [torch.randn(5, 20), torch.randn(40, 20)], torch.tensor([0.2, 0.7])
    with torch.no_grad():
        true = model(images, t, captions, return_dict=False)[0]
        found = fuse(model)(images, t, captions, return_dict=False)[0]
    for a, b in zip(found, true, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_controlnet_residuals_are_added_where_stock_adds_them() -> None:
    case = CASES["z-image, even captions"]
    model, batch = stock_model(case), batch_of(case)
    captions = [f[:n] for f, n in zip(batch.context.features, batch.context.lengths.tolist(), strict=True)]
    residuals = {0: torch.randn(2, 32 + 32, 48), 1: torch.randn(2, 64, 48)}

    def call() -> Tensor:
        images = list(batch.x.unsqueeze(2).unbind(0))
        with torch.no_grad():
            return torch.stack(
                model(images, batch.sigma, captions, controlnet_block_samples=residuals, return_dict=False)[0]
            )

    true = call()
    fuse(model)
    assert relative_error(call(), true) <= 1e-5


class ForeignProcessor:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError


def test_what_cannot_be_fused_is_named() -> None:
    with pytest.raises(TypeError, match=r"cannot fuse Linear; accepted are .*ZImageTransformer2DModel"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="cannot fuse AutoencoderKL"):
        fuse(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    model = stock_model(CASES["z-image"])
    model.layers[1].attention.processor = ForeignProcessor()
    with pytest.raises(TypeError, match=r"layers\.1\.attention .* processor ForeignProcessor"):
        fuse(model)
    assert "twostep" not in type(model.layers[0]).__module__  # nothing was changed
    with pytest.raises(TypeError, match=r"fuse first, then torch\.compile"):
        fuse(torch.compile(stock_model(CASES["z-image"])))


class OwnNorm(nn.Module):
    """What has a weight and an eps, and does something else with them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.weight


def _subclass(module: nn.Module) -> None:
    module.__class__ = type("OwnAttention", (type(module),), {})


def _replaced(module: nn.Module) -> None:
    module.forward = lambda *args, **kwargs: None


def _put(name: str, norm: nn.Module) -> Any:
    return lambda owner: setattr(owner, name, norm)


FOREIGN_PARTS = {
    "z-image": [
        ("layers.0", _put("attention_norm2", nn.LayerNorm(32)), r"attention_norm2 is a .*LayerNorm, expected RMSNorm"),
        ("layers.0", _put("ffn_norm1", OwnNorm(32)), r"ffn_norm1 is a .*OwnNorm, expected RMSNorm"),
        ("layers.0", _put("ffn_norm1", nn.Identity()), r"ffn_norm1 is a .*Identity"),
        ("layers.0.attention", _put("norm_q", nn.LayerNorm(16)), r"attention\.norm_q is a .*LayerNorm"),
        ("layers.0", lambda block: setattr(block.ffn_norm2, "eps", 0.5), r"different eps \(.*ffn_norm2 0\.5\)"),
        ("layers.0.ffn_norm1", _replaced, "ffn_norm1 has a forward of its own"),
        ("layers.0.attention", _subclass, "attention is a .*OwnAttention, which derives"),
        ("layers.0.attention", lambda attention: setattr(attention, "norm_k", None), "norm_q and not norm_k"),
        ("cap_embedder", lambda embedder: embedder.__setitem__(0, RMSNorm(20, eps=1e-5, bias=True)), r"0 has a bias"),
    ],
    "flux2": [
        ("single_transformer_blocks.0", _put("norm", nn.LayerNorm(32)), "0.norm has a bias"),
        ("transformer_blocks.0", _put("norm2", nn.LayerNorm(32, bias=False)), "norm2 has a weight"),
        ("transformer_blocks.0.attn", _subclass, "attn is a .*OwnAttention, which derives"),
        ("single_transformer_blocks.0.attn.norm_q", lambda norm: setattr(norm, "eps", None), "norm_q has no eps"),
        ("transformer_blocks.0.attn.norm_added_k", lambda norm: setattr(norm, "eps", 0.5), "different eps"),
    ],
}


@pytest.mark.parametrize(
    ("name", "place", "change", "message"), [(name, *part) for name, parts in FOREIGN_PARTS.items() for part in parts]
)
def test_a_part_whose_forward_would_be_lost_is_named(name: str, place: str, change: Any, message: str) -> None:
    model = stock_model(CASES[name])
    change(model.get_submodule(place))
    with pytest.raises(TypeError, match=message):
        fuse(model)
    assert not is_fused(model)


def test_what_accelerate_leaves_behind_is_no_forward_of_ones_own() -> None:
    case = CASES["z-image"]
    model = stock_model(case)
    expected = call_stock(model, case, batch_of(case))
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    remove_hook_from_module(model, recurse=True)
    assert "forward" in vars(model.layers[0].ffn_norm1)
    fuse(model)
    assert not any("forward" in vars(module) for module in (model, model.layers[0], model.layers[0].feed_forward))
    assert relative_error(call_stock(fuse(model), case, batch_of(case)), expected) < 1e-5


@BOTH
def test_norms_that_peft_trains_in_full_are_read_where_it_keeps_them(name: str) -> None:
    case = CASES[name]
    norms = ["attention_norm1", "ffn_norm1"] if name == "z-image" else ["norm_q", "norm_k"]
    model = stock_model(case)
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS[case.family], modules_to_save=norms))
    for path, parameter in model.named_parameters():
        if "modules_to_save" in path:
            parameter.data += 0.3
    expected = call_stock(model, case, batch_of(case))
    assert relative_error(call_stock(fuse(model), case, batch_of(case)), expected) < 1e-5


@BOTH
def test_who_comes_after_fuse_finds_the_attention_called(name: str) -> None:
    """By hooks on all modules, by a forward of its own, by torch.compile of the module alone."""
    case = CASES[name]
    model, batch = fuse(stock_model(case)), batch_of(case)
    block = (model.layers if name == "z-image" else model.single_transformer_blocks)[0]
    attention = block.attention if name == "z-image" else block.attn
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    call_stock(model, case, batch)
    handle.remove()
    assert any(module is attention for module in seen)
    graphs: list[Any] = []
    attention.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    call_stock(model, case, batch)
    assert graphs
    attention._compiled_call_impl = None
    before = call_stock(model, case, batch)
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs).flip(-1)
    assert relative_error(call_stock(model, case, batch), before) > 1e-4
    assert fuse(model) is model  # a second call changes nothing


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("captions", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_captions_in_another_dtype_than_the_models(dtype: torch.dtype, captions: torch.dtype) -> None:
    """As an encoder that was loaded in its own dtype makes them."""
    case = CASES["z-image"]
    exact = stock_model(case, dtype=torch.float64)
    stock = stock_model(case, dtype=dtype)
    exact.load_state_dict(stock.state_dict())
    batch = batch_of(case).to(dtype)
    batch.context = batch.context.to(dtype=captions)
    true = call_stock(exact, case, batch.to(torch.float64))
    theirs = relative_error(call_stock(stock, case, batch), true)
    ours = call_stock(fuse(stock), case, batch)
    assert ours.dtype == dtype
    assert relative_error(ours, true) < 2 * theirs + 1e-6


def test_a_pipeline_whose_parts_have_their_own_dtypes_runs_as_before() -> None:
    """As it is loaded when no dtype is asked for: each part in the one that it was saved in, or float32."""
    pipeline = ZImagePipeline.from_pretrained(weights_folder())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.dtype != pipeline.text_encoder.dtype

    def latents() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
        return pipeline("a red circle", generator=generator, **settings).images

    expected = latents()
    fuse(pipeline.transformer)
    assert relative_error(latents(), expected) < 1e-4


def test_a_fused_flux2_refuses_a_cache_of_reference_tokens() -> None:
    case = Case("flux2", flux2(), size=(2, 2), lengths=None)
    model, batch = fuse(stock_model(case)), batch_of(case)
    tokens = batch.x.flatten(2).transpose(1, 2)
    ids = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="unfuse"):
        model(tokens, batch.context.features, batch.sigma, ids, ids[:3], kv_cache_mode="extract", num_ref_tokens=1)


def test_too_many_positions_are_an_error() -> None:
    case = Case("z-image", z_image(axes_lens=[70, 8, 8]), lengths=(5, 40))
    batch = batch_of(case)
    backbone = fused_backbone(case)
    backbone.velocity(batch.x, batch.sigma, batch.context)
    long = Case("z-image", case.config, lengths=(5, 70))
    with pytest.raises(ValueError, match=r"98 positions .* axis 0 .* this model has 70"):
        backbone.velocity(batch.x, batch.sigma, batch_of(long).context)
    wide = batch_of(Case("z-image", case.config, size=(2, 18), lengths=(5, 40)))
    with pytest.raises(ValueError, match=r"9 positions .* axis 2"):
        backbone.velocity(wide.x, wide.sigma, wide.context)


def test_flux2_keeps_float16_finite_where_stock_does() -> None:
    """Stock clips what the residuals of a single block, and of a double block's text, would overflow to."""
    model = stock_model(CASES["flux2"], dtype=torch.float16)
    width = model.inner_dim
    for last in (model.single_transformer_blocks[0].attn.to_out, model.transformer_blocks[0].ff_context.linear_out):
        last.weight.data *= 100
    g = torch.Generator().manual_seed(0)
    hidden, text = (torch.randn(1, n, width, generator=g).half() * 10 for n in (4, 3))
    rotary = torch.ones(7, 16, dtype=torch.float32), torch.zeros(7, 16, dtype=torch.float32)
    none = torch.zeros(1, 1, 2 * width, dtype=torch.float16)  # shift and scale
    gate = torch.full((1, 1, width), 60000.0, dtype=torch.float16)
    found = []
    for network in (model, fuse(copy_of(model))):
        single, double = network.single_transformer_blocks[0], network.transformer_blocks[0]
        with torch.no_grad():
            joint = single(torch.cat([text, hidden], 1), None, torch.cat([none, gate], -1), rotary)
            feed_forward = torch.cat([none, 0 * gate, none, gate], -1)
            found.append((joint, double(hidden, text, 0 * feed_forward, feed_forward, rotary)[0]))
    for stock, ours in zip(*found, strict=True):
        assert bool(stock.isfinite().all()) and stock.abs().max() == 65504
        assert bool(ours.isfinite().all()) and ours.abs().max() == 65504


def test_unfuse_of_a_stock_model_changes_nothing() -> None:
    model = stock_model(CASES["flux2"])
    assert unfuse(model) is model


@BOTH
def test_the_life_of_an_adapter_in_a_fused_model_is_as_in_stock(name: str, tmp_path: Path) -> None:
    """Saved, merged, unmerged, unloaded, loaded, deleted, and still there after unfuse."""
    case, batch = CASES[name], batch_of(CASES[name])
    stock, model = stock_model(case), fuse(stock_model(case))
    add_lora(stock, case)
    add_lora(model, case)
    load = {"prefix": None, "weight_name": "pytorch_lora_weights.safetensors"}
    with torch.no_grad():
        plain, adapted = call_stock(stock_model(case), case, batch), call_stock(stock, case, batch)

        def check(expected: Tensor) -> None:
            assert relative_error(call_stock(model, case, batch), expected) <= 1e-5

        model.save_lora_adapter(tmp_path, adapter_name="default")
        model.fuse_lora()
        check(adapted)
        model.unfuse_lora()
        check(adapted)
        model.unload_lora()
        assert is_fused(model)
        check(plain)
        model.load_lora_adapter(tmp_path, adapter_name="again", **load)
        check(adapted)
        model.delete_adapters("again")
        check(plain)
        model.load_lora_adapter(tmp_path, adapter_name="last", **load)
        unfuse(model)
        check(adapted)


@BOTH
def test_a_fused_model_can_be_copied_and_pickled(name: str) -> None:
    case, batch = CASES[name], batch_of(CASES[name])
    model = fuse(stock_model(case))
    with torch.no_grad():
        true = call_stock(model, case, batch)
        for other in (copy_of(model), pickle.loads(pickle.dumps(model))):
            assert is_fused(other) and torch.equal(call_stock(other, case, batch), true)


@BOTH
def test_a_pipeline_made_with_a_fused_model_saves_what_stock_diffusers_loads(name: str, tmp_path: Path) -> None:
    """model_index.json names the transformer's class and where it comes from: diffusers."""
    case = CASES[name]
    kind = ZImagePipeline if case.family == "z-image" else Flux2KleinPipeline
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    kind(FlowMatchEulerDiscreteScheduler(), vae, None, None, fuse(stock_model(case))).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", type(stock_model(case)).__name__]
    loaded = DiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None, vae=None)
    assert type(loaded.transformer) is type(stock_model(case))


@BOTH
def test_a_fused_class_makes_whole_fused_models(name: str, tmp_path: Path) -> None:
    """type(model).from_pretrained, as trainers that are built on diffusers have it, and from_config."""
    case = CASES[name]
    model, batch = stock_model(case), batch_of(case)
    true = call_stock(model, case, batch)
    fuse(model).save_pretrained(tmp_path)
    for made in (type(model).from_pretrained(tmp_path), type(model).from_config(model.config)):
        assert {n: type(m) for n, m in made.named_modules()} == {n: type(m) for n, m in model.named_modules()}
        made.load_state_dict(model.state_dict())
        assert relative_error(call_stock(made, case, batch), true) <= 1e-5
        unfuse(made)
        assert torch.equal(call_stock(made, case, batch), true)


@BOTH
def test_hooks_are_called_but_on_norms(name: str) -> None:
    case = CASES[name]
    called: dict[bool, set[str]] = {}
    for fused in (False, True):
        model, seen = stock_model(case), set()
        if fused:
            fuse(model)
        for path, module in model.named_modules():
            module.register_forward_hook(lambda *_, path=path, seen=seen: seen.add(path))
        call_stock(model, case, batch_of(case))
        called[fused] = seen
    assert any(path.endswith((".attention", ".attn")) for path in called[True])
    assert all("norm" in path or path.endswith("gate_fn") for path in called[False] - called[True])


@pytest.mark.parametrize("cache", ["pyramid attention", "taylor"])
def test_diffusers_caches_work_as_on_stock(cache: str) -> None:
    case = CASES["flux2"]
    batches = [batch_of(case, seed) for seed in (1, 2, 1)]
    settings = {
        "pyramid attention": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 10000),
            current_timestep_callback=lambda: 500,
            spatial_attention_block_identifiers=("transformer_blocks",),
        ),
        "taylor": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1),
    }[cache]
    found = {}
    for name in ("stock", "stock with its cache", "fused with its cache"):
        model = stock_model(case)
        if name.startswith("fused"):
            fuse(model)
        if name != "stock":
            model.enable_cache(settings)
        with torch.no_grad(), model.cache_context("test"):
            found[name] = torch.stack([call_stock(model, case, batch) for batch in batches])
    assert relative_error(found["stock with its cache"], found["stock"]) > 1e-3
    assert relative_error(found["fused with its cache"], found["stock with its cache"]) <= 1e-5
