"""FLUX.2's blocks, attention and output norm on the fused operators; names and parameters are those of diffusers.

    double block, on image and on text:   x, h = x + g1 z, LN(x) (1 + s2) + b2      one seam, one pass
                                          x = x + g2 ff(h)
    single block:                         x = x + g to_out([attention, swiglu])
                                          both from one projection of LN(x) (1 + s) + b

LayerNorms have no weight; modulation is shared by all blocks, [B, 1, D] or [B, L, D]. Rotary tables are real,
[1, S, Dh/2, 2]; stock's pair (cos, sin), each [S, Dh] with every value twice, is taken as well.
"""

from __future__ import annotations

import torch
from diffusers.models.normalization import AdaLayerNormContinuous as StockNormOut
from diffusers.models.transformers import transformer_flux2 as stock
from torch import Tensor

from ... import ops
from ..attention import attend, call


def table(rotary: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """[1, S, Dh/2, 2] from stock's (cos, sin); a table is handed on."""
    if isinstance(rotary, Tensor):
        return rotary
    cos, sin = rotary
    return torch.stack([cos[:, ::2], sin[:, ::2]], dim=-1).unsqueeze(0)


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    return projected.unflatten(-1, (-1, head_dim))  # [B, L, H, Dh]


class Flux2SwiGLU(stock.Flux2SwiGLU):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(x)


class Flux2AttnProcessor(stock.Flux2AttnProcessor):  # type: ignore[misc]
    """Joint attention of text and image: two norms, one table, one call of diffusers' dispatch."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        query, key, value, *text = stock._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (_heads(t, attn.head_dim) for t in (query, key, value))
        freqs = None if image_rotary_emb is None else table(image_rotary_emb)
        length = 0
        if attn.added_kv_proj_dim is not None:
            text_query, text_key, text_value = (_heads(t, attn.head_dim) for t in text)
            length = text_query.shape[1]
            text_freqs = None if freqs is None else freqs[:, :length]
            text_query, text_key = _norm_rope(text_query, text_key, attn.norm_added_q, attn.norm_added_k, text_freqs)
        query, key = _norm_rope(query, key, attn.norm_q, attn.norm_k, None if freqs is None else freqs[:, length:])
        if length:
            query = torch.cat([text_query, query], dim=1)
            key = torch.cat([text_key, key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        out = attend(query, key, value, attention_mask, self).flatten(2, 3)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        text_out, out = out.split([length, out.shape[1] - length], dim=1)
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(text_out)


def _norm_rope(query, key, norm_q, norm_k, freqs: Tensor | None) -> tuple[Tensor, Tensor]:
    if freqs is None:
        return norm_q(query), norm_k(key)
    return ops.qk_norm_rope(query, key, norm_q.weight, norm_k.weight, freqs, eps=norm_q.eps)


class Flux2ParallelSelfAttnProcessor(stock.Flux2ParallelSelfAttnProcessor):  # type: ignore[misc]
    """Attention and feed-forward from one projection; the operators read its parts in place."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        projected = attn.to_qkv_mlp_proj(hidden_states)
        # Proportional, so that a column-sharded projection is cut right too (stock's rule for tensor parallelism).
        qkv_dim, mlp_dim = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        local = projected.shape[-1] * qkv_dim // (qkv_dim + mlp_dim)
        # One split, not slices: the gradients of its parts meet in one concatenation, those of slices are padded with
        # zeros and added: the miniature's forward and backward, 6 blocks of width 128 in float32, takes 421 ms with
        # slices and 398 ms so (2 cores of an EPYC).
        parts = projected.split([local // 3] * 3 + [projected.shape[-1] - local], dim=-1)
        query, key, value = (_heads(t, attn.head_dim) for t in parts[:3])
        freqs = None if image_rotary_emb is None else table(image_rotary_emb)
        query, key = _norm_rope(query, key, attn.norm_q, attn.norm_k, freqs)
        out = attend(query, key, value, attention_mask, self)
        return attn.to_out(torch.cat([out.flatten(2, 3), attn.mlp_act_fn(parts[3])], dim=-1))


def _attend(attn, *hidden, rotary, kwargs):
    extra = set(kwargs) - {"attention_mask"}
    if extra:
        raise ValueError(
            f"a fused FLUX.2 block takes attention_mask in joint_attention_kwargs, not {sorted(extra)}: unfuse(model) "
            f"first"
        )
    return call(attn, *hidden, attention_mask=kwargs.get("attention_mask"), image_rotary_emb=rotary)


def _in_range(hidden: Tensor) -> Tensor:
    """Stock keeps float16 activations finite by clipping them."""
    return hidden.clip(-65504, 65504) if hidden.dtype == torch.float16 else hidden


class Flux2SingleTransformerBlock(stock.Flux2SingleTransformerBlock):  # type: ignore[misc]
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb_mod,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
        split_hidden_states=False,
        text_seq_len=None,
    ):
        if encoder_hidden_states is not None:
            text_seq_len = encoder_hidden_states.shape[1]
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = stock.Flux2Modulation.split(temb_mod, 1)[0]
        h = ops.norm_modulate(hidden_states, None, scale, shift, norm="layer", eps=self.norm.eps)
        h = _attend(self.attn, h, rotary=image_rotary_emb, kwargs=joint_attention_kwargs or {})
        hidden_states = _in_range(ops.gated_residual(hidden_states, h, gate, norm="none", gate_act="none"))
        if split_hidden_states:
            return hidden_states[:, :text_seq_len], hidden_states[:, text_seq_len:]
        return hidden_states


class Flux2TransformerBlock(stock.Flux2TransformerBlock):  # type: ignore[misc]
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb_mod_img,
        temb_mod_txt,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
    ):
        image, text = (stock.Flux2Modulation.split(mod, 2) for mod in (temb_mod_img, temb_mod_txt))
        (shift, scale, gate), (c_shift, c_scale, c_gate) = image[0], text[0]
        h = ops.norm_modulate(hidden_states, None, scale, shift, norm="layer", eps=self.norm1.eps)
        c = ops.norm_modulate(encoder_hidden_states, None, c_scale, c_shift, norm="layer", eps=self.norm1_context.eps)
        h, c = _attend(self.attn, h, c, rotary=image_rotary_emb, kwargs=joint_attention_kwargs or {})
        hidden_states = _branch_end(hidden_states, h, gate, image[1], self.norm2, self.ff)
        encoder_hidden_states = _branch_end(
            encoder_hidden_states, c, c_gate, text[1], self.norm2_context, self.ff_context
        )
        return _in_range(encoder_hidden_states), hidden_states


def _branch_end(x: Tensor, z: Tensor, gate: Tensor, modulation: tuple[Tensor, ...], norm, feed_forward) -> Tensor:
    """The residual of attention, then the whole feed-forward branch."""
    shift, scale, gate_ffn = modulation
    x, h = ops.gated_residual_norm_modulate(
        x, z, gate, None, None, scale, shift, norm="layer", post_norm="none", gate_act="none", eps=norm.eps
    )
    return ops.gated_residual(x, feed_forward(h), gate_ffn, norm="none", gate_act="none")


class AdaLayerNormContinuous(StockNormOut):  # type: ignore[misc]
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return ops.norm_modulate(x, self.norm.weight, scale, shift, norm="layer", eps=self.norm.eps)
