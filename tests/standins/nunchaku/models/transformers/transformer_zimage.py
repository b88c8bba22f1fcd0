"""Quantized Z-Image: diffusers' class and blocks, with attention and MLP of its own.

nunchaku 1.2 calls diffusers' forward by position, in the order that diffusers has had to 0.36; here it is by name.
"""

import copy

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_z_image import FeedForward as ZImageFeedForward
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor, nn

from ...ops.fused import rotary_tables
from ..embeddings import pack_rotemb
from ..linear import SVDQW4A4Linear
from ..utils import fuse_linears, pad_tensor


class NunchakuZImageRopeHook:
    """Packs the rotary embeddings on their way into each attention, once for each place in memory.

    Whoever gives attentions of one forward other embeddings, at a place that was free again, gets the earlier ones.
    """

    def __init__(self):
        self.packed_cache: dict[int, Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        table = kwargs.get("freqs_cis")
        if table is None:
            return None
        place = table.data_ptr()
        if place not in self.packed_cache:
            sine_and_cosine = torch.view_as_real(table).flip(-1).unsqueeze(3)
            self.packed_cache[place] = pack_rotemb(pad_tensor(sine_and_cosine, 256, 1))
        return args, kwargs | {"freqs_cis": self.packed_cache[place]}


class NunchakuZImageFusedModule(nn.Module):
    """Projection, norm and rotation of query and key in one kernel, and the projection of the value."""

    def __init__(self, qkv: SVDQW4A4Linear, norm_q: nn.Module, norm_k: nn.Module, heads: int):
        super().__init__()
        self.qkv_qweight, self.qkv_bias = qkv.qweight, qkv.bias
        self.norm_q_weight, self.norm_k_weight = norm_q.weight, norm_k.weight
        self._parts, self._heads = (qkv, norm_q, norm_k), heads  # a tuple: no submodules, as in nunchaku

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        qkv, *norms = self._parts
        batch, tokens, _ = x.shape
        cosine, sine = rotary_tables(freqs_cis, batch, tokens)
        rotation = torch.complex(cosine[..., ::2], sine[..., ::2]).unsqueeze(2)
        *turned, value = qkv(x).chunk(3, dim=-1)
        for index, norm in enumerate(norms):
            normed = norm(turned[index].unflatten(-1, (self._heads, -1)))
            pairs = torch.view_as_complex(normed.float().unflatten(-1, (-1, 2)))
            turned[index] = torch.view_as_real(pairs * rotation).flatten(2).to(x.dtype)
        return torch.cat([*turned, value], dim=-1)


class NunchakuZImageAttention(nn.Module):
    """Attention whose projection, `fused_module`, takes packed rotary embeddings only."""

    def __init__(self, orig_attn: Attention):
        super().__init__()
        self.heads, self.inner_dim = orig_attn.heads, orig_attn.inner_dim
        qkv = SVDQW4A4Linear.from_linear(fuse_linears([orig_attn.to_q, orig_attn.to_k, orig_attn.to_v]))
        self.fused_module = NunchakuZImageFusedModule(qkv, orig_attn.norm_q, orig_attn.norm_k, self.heads)
        self.to_out = orig_attn.to_out
        self.to_out[0] = SVDQW4A4Linear.from_linear(self.to_out[0])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        fused = self.fused_module(hidden_states, freqs_cis)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in fused.chunk(3, dim=-1))
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        attended = dispatch_attention_fn(query, key, value, attn_mask=attention_mask).flatten(2, 3).to(query.dtype)
        return self.to_out[1](self.to_out[0](attended))


def converted(feed_forward: ZImageFeedForward) -> FeedForward:
    """The MLP as diffusers' own, with both input layers in one: `net[0].proj` and `net[2]` for w3, w1 and w2."""
    w1, w2, w3 = feed_forward.w1, feed_forward.w2, feed_forward.w3
    made = FeedForward(w1.in_features, w2.out_features, activation_fn="swiglu", inner_dim=w2.in_features, bias=False)
    made.net[0].proj, made.net[2] = fuse_linears([w3, w1]), w2
    return made


class NunchakuZImageFeedForward(FeedForward):
    """The MLP with quantized layers, called one by one."""

    def __init__(self, ff: ZImageFeedForward):
        super(FeedForward, self).__init__()
        self.net = converted(ff).net
        self.net[0].proj = SVDQW4A4Linear.from_linear(self.net[0].proj)
        self.net[2] = SVDQW4A4Linear.from_linear(self.net[2])


class NunchakuZImageTransformer2DModel(ZImageTransformer2DModel):
    """Made from a diffusers Z-Image by `standing_for`, where the real one is made by `from_pretrained`."""

    @classmethod
    def standing_for(
        cls, model: ZImageTransformer2DModel, torch_dtype: torch.dtype = torch.bfloat16, skip_refiners: bool = False
    ) -> "NunchakuZImageTransformer2DModel":
        made = cls.from_config(model.config)
        made.load_state_dict(copy.deepcopy(model.state_dict()))
        return made.to(torch_dtype)._patch_model(skip_refiners).eval()

    def _patch_model(self, skip_refiners: bool = False):
        """With `skip_refiners`, only the MLPs of refiners are written otherwise."""
        self.skip_refiners = skip_refiners
        refiners = [*self.noise_refiner, *self.context_refiner]
        for block in refiners if skip_refiners else ():
            block.feed_forward = converted(block.feed_forward)
        for block in self._quantized_blocks():
            block.attention = NunchakuZImageAttention(block.attention)
            block.feed_forward = NunchakuZImageFeedForward(block.feed_forward)
        return self

    def _quantized_blocks(self) -> list[nn.Module]:
        return [*self.layers, *([] if self.skip_refiners else [*self.noise_refiner, *self.context_refiner])]

    def register_rope_hook(self, rope_hook: NunchakuZImageRopeHook) -> None:
        attentions = [block.attention for block in self._quantized_blocks()]
        self.rope_hook_handles = [
            attention.register_forward_pre_hook(rope_hook, with_kwargs=True) for attention in attentions
        ]

    def unregister_rope_hook(self) -> None:
        for handle in self.rope_hook_handles:
            handle.remove()
        self.rope_hook_handles.clear()

    def forward(
        self,
        x: list[Tensor],
        t: Tensor,
        cap_feats: list[Tensor],
        patch_size: int = 2,
        f_patch_size: int = 1,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[list[Tensor]]:
        """Blocks take diffusers' rotary embeddings; only while this runs are they packed on their way in."""
        self.register_rope_hook(NunchakuZImageRopeHook())
        try:
            return super().forward(
                x, t, cap_feats, patch_size=patch_size, f_patch_size=f_patch_size, return_dict=return_dict
            )
        finally:
            self.unregister_rope_hook()
