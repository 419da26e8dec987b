"""Z-Image's block, attention and final layer on the fused operators.

The classes carry the names of the diffusers classes they stand in for and add no parameters, so that a model whose
modules get these classes (zoo/fuse.py) keeps its state_dict keys, its configuration and every test by class name.

    x, h = x + tanh(g1) N2(attention(N1(x) (1 + s1))),  M1(x) (1 + s2)      one seam, one pass
    x    = x + tanh(g2) M2(feed_forward(h))

with s1, g1, s2, g2 = Linear(t), per sample, or per token where some tokens are clean (the omni path). A context refiner
has neither s nor g. Rotary tables are real, [B or 1, L, Dh/2, 2]; a complex one, stock code's, is viewed as real.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers import transformer_z_image as stock
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from ... import ops
from ...ops.swiglu import swiglu_of_spent
from ..attention import attend, call

_linear_forward = nn.Linear.forward


def _real(freqs: Tensor) -> Tensor:
    return torch.view_as_real(freqs) if freqs.is_complex() else freqs


def _per_token(noisy: Tensor, clean: Tensor, noise_mask: Tensor) -> Tensor:
    """[B, L, D]: noisy where the mask is 1, clean elsewhere; both are [B, D]."""
    return torch.where(noise_mask.unsqueeze(-1) == 1, noisy.unsqueeze(1), clean.unsqueeze(1))


class ZSingleStreamAttnProcessor(stock.ZSingleStreamAttnProcessor):  # type: ignore[misc]
    """Attention of one stream, through diffusers' dispatch, so that its backends go by their names."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # [B, L, H, Dh]
        key = attn.to_k(hidden_states).unflatten(-1, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))
        if attn.norm_q is not None and attn.norm_k is not None and freqs_cis is not None:
            query, key = ops.qk_norm_rope(
                query, key, attn.norm_q.weight, attn.norm_k.weight, _real(freqs_cis), eps=attn.norm_q.eps
            )
        elif freqs_cis is not None:
            query, key = ops.rope(query, _real(freqs_cis)), ops.rope(key, _real(freqs_cis))
        hidden_states = attend(query, key, value, attention_mask, self)
        hidden_states = attn.to_out[0](hidden_states.flatten(2, 3))
        return attn.to_out[1](hidden_states) if len(attn.to_out) > 1 else hidden_states


class FeedForward(stock.FeedForward):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        # What a layer of another kind, a hook or a replaced forward has made may be looked at again: not written over.
        w1 = self.w1
        spent = (
            type(w1) is nn.Linear
            and not (w1._forward_hooks or every_module._global_forward_hooks)
            and "forward" not in vars(w1)
            and nn.Linear.forward is _linear_forward
        )
        run = swiglu_of_spent if spent else ops.swiglu
        return self.w2(run(w1(x), self.w3(x)))


class ZImageTransformerBlock(stock.ZImageTransformerBlock):  # type: ignore[misc]
    def _modulation(self, adaln_input, noise_mask, adaln_noisy, adaln_clean) -> tuple[Tensor | None, ...]:
        """scale and gate of attention, scale and gate of the feed-forward: each [B, 1, D], [B, L, D] or None."""
        if not self.modulation:
            return None, None, None, None
        if noise_mask is None:
            modulation = self.adaLN_modulation(adaln_input).unsqueeze(1)
        else:
            modulation = _per_token(self.adaLN_modulation(adaln_noisy), self.adaLN_modulation(adaln_clean), noise_mask)
        return modulation.chunk(4, dim=2)

    def forward(
        self, x, attn_mask, freqs_cis, adaln_input=None, noise_mask=None, adaln_noisy=None, adaln_clean=None
    ) -> Tensor:
        scale_attn, gate_attn, scale_ffn, gate_ffn = self._modulation(adaln_input, noise_mask, adaln_noisy, adaln_clean)
        before, after, eps = self.attention_norm1, self.attention_norm2, self.attention_norm1.eps
        h = ops.norm_modulate(x, before.weight, scale_attn, eps=eps)
        h = call(self.attention, h, attention_mask=attn_mask, freqs_cis=freqs_cis)
        x, h = ops.gated_residual_norm_modulate(
            x, h, gate_attn, after.weight, self.ffn_norm1.weight, scale_ffn, None, eps=eps
        )
        return ops.gated_residual(x, self.feed_forward(h), gate_ffn, self.ffn_norm2.weight, eps=eps)


class FinalLayer(stock.FinalLayer):  # type: ignore[misc]
    def forward(self, x, c=None, noise_mask=None, c_noisy=None, c_clean=None) -> Tensor:
        if noise_mask is None:
            scale = self.adaLN_modulation(c)
        else:
            scale = _per_token(self.adaLN_modulation(c_noisy), self.adaLN_modulation(c_clean), noise_mask)
        return self.linear(ops.norm_modulate(x, None, scale, norm="layer", eps=self.norm_final.eps))


class RMSNorm(stock.RMSNorm):  # type: ignore[misc]
    """The caption embedder's norm. Captions may come in another dtype than the model's, from an encoder that was
    loaded in its own: as in stock code, the result has a 16-bit weight's dtype, and else the wider of both."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.weight is None:
            return ops.norm_modulate(hidden_states, eps=self.eps)
        wide = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        out = ops.norm_modulate(hidden_states.to(wide), self.weight, eps=self.eps)
        return out.to(self.weight.dtype) if self.weight.dtype in (torch.float16, torch.bfloat16) else out
