"""The layers of nunchaku's first generation (V1), which run inside one C++ core, each as a block of its own.

The modules here belong to the adapter and never to the transformer; they hold no weights. A double layer and a single
layer are called alike, on both streams, so that streams are only joined where the core takes them as one tensor, and
not even there if they lie next to each other already.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block_call import BlockCall, BlockInterface, Rows, Streams


class Rotary(NamedTuple):
    """Rotary embeddings as the core reads them: packed, float32, each padded to a multiple of 256 tokens."""

    image: Tensor
    text: Tensor
    single: Tensor


@dataclass(frozen=True)
class Identity:
    """What PuLID adds to the image tokens behind some layers: `weight * cross_attention(embeddings, tokens)`.

    The core asks for it behind every second double and every fourth single layer, and uses the cross-attentions up one
    after another.
    """

    cross_attentions: Sequence[Callable[[Tensor, Tensor], Tensor]]
    embeddings: Tensor
    weight: float

    def residual(self, number: int, image: Tensor) -> Tensor:
        return self.weight * self.cross_attentions[number](self.embeddings, image)

    @contextmanager
    def called_back(self, core: Any, number: int) -> Iterator[None]:
        """While open, the core adds the residuals by itself, from `number` on."""

        numbers = count(number)
        core.set_residual_callback(lambda image: self.residual(next(numbers), image))
        try:
            yield
        finally:
            core.set_residual_callback(None)


@dataclass(frozen=True)
class ImagePrompt:
    """What IP-Adapter adds to the image tokens behind every double layer: `scale` times what the layer's queries see.

    Fields:
        keys, values: the projections of the prompt, for each layer.
        tokens: of the prompt, (1, T, E).
        scale: of what is added.
        heads: of the attention.
    """

    keys: Sequence[Callable[[Tensor], Tensor]]
    values: Sequence[Callable[[Tensor], Tensor]]
    tokens: Tensor
    scale: float
    heads: int

    def residual(self, index: int, queries: Tensor) -> Tensor:
        """(1, N, D), of the queries (1, N, D) of double layer `index`."""
        parts = queries, self.keys[index](self.tokens), self.values[index](self.tokens)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value)
        return self.scale * seen.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """One layer of the core.

    `index` counts layers of its kind. `number` is that of the PuLID cross-attention behind it, None where there is
    none. `forward` is called by name with `LayerCall`'s arguments and returns (text, image).
    """

    def __init__(self, core: Any, index: int, number: int | None):
        super().__init__()
        self.core, self.index, self.number = core, index, number

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary: Rotary,
        identity: Identity | None = None,
        prompt: ImagePrompt | None = None,
        rest: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """With `rest`, every layer behind the first, in one call of the core, which knows no image prompt."""
        if rest:
            return self._rest(hidden_states, encoder_hidden_states, temb, rotary, identity)
        text, image = self._run(hidden_states, encoder_hidden_states, temb, rotary, prompt)
        if identity is not None and self.number is not None:
            image = image + identity.residual(self.number, image)
        return text, image

    def _run(
        self, image: Tensor, text: Tensor, temb: Tensor, rotary: Rotary, prompt: ImagePrompt | None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _rest(self, image: Tensor, text: Tensor, temb: Tensor, rotary: Rotary, identity: Identity | None) -> tuple:
        behind: AbstractContextManager = identity.called_back(self.core, 1) if identity else nullcontext()
        with behind:
            joined = self.core.forward(
                image.contiguous(), text.contiguous(), temb, rotary.image, rotary.text, rotary.single, None, None, True
            )
        return joined[:, : text.shape[1]], joined[:, text.shape[1] :]


class DoubleLayer(Layer):
    """A layer on two streams."""

    def _run(
        self, image: Tensor, text: Tensor, temb: Tensor, rotary: Rotary, prompt: ImagePrompt | None
    ) -> tuple[Tensor, Tensor]:
        given = self.index, image.contiguous(), text.contiguous(), temb, rotary.image, rotary.text
        if prompt is None:
            image, text = self.core.forward_layer(*given)
            return text, image
        image, text, queries = self.core.forward_layer_ip_adapter(*given)
        return text, image + prompt.residual(self.index, queries)

    def norm1(self, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """The first norm, alone: modulated image tokens, and four gates, shifts and scales."""
        return self.core.norm_one_forward(self.index, hidden_states.contiguous(), emb)


class SingleLayer(Layer):
    """A layer on [text; image]."""

    def _run(
        self, image: Tensor, text: Tensor, temb: Tensor, rotary: Rotary, prompt: ImagePrompt | None
    ) -> tuple[Tensor, Tensor]:
        joined = self.core.forward_single_layer(self.index, join(text, image), temb, rotary.single)
        return joined[:, : text.shape[1]], joined[:, text.shape[1] :]


def layers(core: Any, double: int, single: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """The core's double and single layers, in the order of the network."""
    behind_double = (double + 1) // 2
    return (
        [DoubleLayer(core, i, i // 2 if i % 2 == 0 else None) for i in range(double)],
        [SingleLayer(core, i, behind_double + i // 4 if i % 4 == 0 else None) for i in range(single)],
    )


class LayerCall(BlockCall):
    """Both streams in and out; what stands in for skipped layers is written as one tensor [text; image]."""

    def __init__(self, block: nn.Module):
        super().__init__(block, BlockInterface(per_sample=("temb", "identity")))

    def room(self, streams: Streams) -> Streams | None:
        if torch.is_grad_enabled():
            return None  # what is written into a tensor has no gradient
        image, text = streams
        batch, text_tokens, width = text.shape
        joined = image.new_empty(batch, text_tokens + image.shape[1], width)
        return joined[:, text_tokens:], joined[:, :text_tokens]

    def select(self, arguments: dict[str, Any], rows: Rows, batch: int) -> dict[str, Any]:
        chosen = super().select(arguments, rows, batch)
        identity = chosen.get("identity")
        if identity is not None and identity.embeddings.shape[0] == batch:
            embeddings = identity.embeddings[rows]
            chosen["identity"] = Identity(identity.cross_attentions, embeddings, identity.weight)
        return chosen


def join(text: Tensor, image: Tensor) -> Tensor:
    """[text; image], (B, M+N, D): the tensor that they are parts of, if they are, else a new one."""
    batch, text_tokens, width = text.shape
    tokens = text_tokens + image.shape[1]
    together = (tokens * width, width, 1)
    if (
        text.stride() == image.stride() == together
        and text.untyped_storage()._cdata == image.untyped_storage()._cdata
        and image.storage_offset() == text.storage_offset() + text_tokens * width
    ):
        return text.as_strided((batch, tokens, width), together)
    return torch.cat([text, image], dim=1)
