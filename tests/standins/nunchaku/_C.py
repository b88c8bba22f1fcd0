"""What stands for the compiled core: `QuantizedFluxModel`."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from .models.embeddings import unpack_rotemb
from .ops.gemv import assert_gemv_samples


class QuantizedFluxModel:
    """All layers of a Flux, behind the functions that nunchaku's C++ core has. It is no module and has no gradient."""

    def __init__(self, double: list[nn.Module], single: list[nn.Module], bf16: bool = True, offload: bool = False):
        self._double, self._single = double, single
        self._bf16, self._offload = bf16, offload
        self._callback: Callable[[Tensor], Tensor] | None = None
        self._loaded = {("double", 0)} if offload else set()  # the first layer always stays
        self._lora: dict[str, Tensor] = {}
        self._lora_scale = 1.0
        self._base: dict[str, Tensor] = {}

    def __reduce_ex__(self, protocol: int):
        raise TypeError("cannot pickle 'nunchaku._C.QuantizedFluxModel' object")

    def isBF16(self) -> bool:
        return self._bf16

    def reset(self) -> None:
        """Let the core go, as the module in front of it does when it dies."""

    def setAttentionImpl(self, name: str) -> None:
        if name not in ("", "default", "flashattn2", "nunchaku-fp16"):
            raise ValueError(f"Invalid attention implementation {name}")

    def set_residual_callback(self, callback: Callable[[Tensor], Tensor] | None) -> None:
        self._callback = callback

    # --- layers -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb_img: Tensor,
        rotary_emb_context: Tensor,
        rotary_emb_single: Tensor,
        controlnet_block_samples: Tensor | None = None,
        controlnet_single_block_samples: Tensor | None = None,
        skip_first_layer: bool = False,
    ) -> Tensor:
        """[text; image] behind all layers, or behind all but the first."""
        image, text = hidden_states, encoder_hidden_states
        self._check_streams(image, text, temb)
        for index in range(int(skip_first_layer), len(self._double)):
            image, text = self._run_double(index, image, text, temb, rotary_emb_img, rotary_emb_context)
            image = self._added(controlnet_block_samples, index, len(self._double), image)
            if self._callback is not None and index % 2 == 0:
                image = image + self._callback(image)
        joined, start = torch.cat([text, image], dim=1), text.shape[1]
        for index in range(len(self._single)):
            joined = self._run_single(index, joined, temb, rotary_emb_single)
            image = self._added(controlnet_single_block_samples, index, len(self._single), joined[:, start:])
            if self._callback is not None and index % 4 == 0:
                image = image + self._callback(image)
            joined = torch.cat([joined[:, :start], image], dim=1)
        return joined

    @torch.no_grad()
    def forward_layer(
        self,
        idx: int,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb_img: Tensor,
        rotary_emb_context: Tensor,
        controlnet_block_samples: Tensor | None = None,
        controlnet_single_block_samples: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(image, text) behind one double layer. No residual is asked for."""
        self._check_streams(hidden_states, encoder_hidden_states, temb)
        image, text = self._run_double(
            idx, hidden_states, encoder_hidden_states, temb, rotary_emb_img, rotary_emb_context
        )
        return self._added(controlnet_block_samples, idx, len(self._double), image), text

    @torch.no_grad()
    def forward_layer_ip_adapter(
        self,
        idx: int,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb_img: Tensor,
        rotary_emb_context: Tensor,
        controlnet_block_samples: Tensor | None = None,
        controlnet_single_block_samples: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(image, text, queries of the image) behind one double layer.

        The queries (B, M, heads * head_dim) are the layer's own, of its output before ControlNet's sample.
        """
        image, text = self.forward_layer(
            idx, hidden_states, encoder_hidden_states, temb, rotary_emb_img, rotary_emb_context
        )
        layer = self._double[idx]
        query = layer.attn.to_q(layer.norm1(image, emb=temb)[0]).unflatten(-1, (layer.attn.heads, -1))
        table = unpack_rotemb(rotary_emb_img, image.shape[1])
        query = apply_rotary_emb(layer.attn.norm_q(query), table, sequence_dim=1).flatten(2)
        return self._added(controlnet_block_samples, idx, len(self._double), image), text, query.contiguous()

    @torch.no_grad()
    def forward_single_layer(self, idx: int, hidden_states: Tensor, temb: Tensor, rotary_emb_single: Tensor) -> Tensor:
        """[text; image] behind one single layer. No residual is asked for, and no sample added."""
        self._check(hidden_states, "hidden_states", 3)
        self._check_temb(temb, len(hidden_states))
        return self._run_single(idx, hidden_states, temb, rotary_emb_single)

    @torch.no_grad()
    def norm_one_forward(self, idx: int, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        """The first norm of a double layer: modulated tokens, and four scales and shifts. Loads no weights."""
        self._check(hidden_states, "hidden_states", 3)
        self._check_temb(temb, len(hidden_states))
        if self._offload and ("double", idx) not in self._loaded:
            raise RuntimeError(f"layer {idx} is not on the device")
        return self._double[idx].norm1(hidden_states, emb=temb)

    def _run_double(
        self, index: int, image: Tensor, text: Tensor, temb: Tensor, rotary_image: Tensor, rotary_text: Tensor
    ) -> tuple[Tensor, Tensor]:
        tables = zip(
            unpack_rotemb(rotary_text, text.shape[1]), unpack_rotemb(rotary_image, image.shape[1]), strict=True
        )
        with self._on_device("double", index):
            text, image = self._layer(self._double, index)(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=temb,
                image_rotary_emb=tuple(torch.cat(parts) for parts in tables),
            )
        return image, text

    def _run_single(self, index: int, joined: Tensor, temb: Tensor, rotary: Tensor) -> Tensor:
        table = unpack_rotemb(rotary, joined.shape[1])
        with self._on_device("single", index):
            _, joined = self._layer(self._single, index)(
                hidden_states=joined, encoder_hidden_states=joined[:, :0], temb=temb, image_rotary_emb=table
            )
        return joined

    @staticmethod
    def _layer(layers: list[nn.Module], index: int) -> nn.Module:
        if not 0 <= index < len(layers):
            raise IndexError(f"layer {index} of {len(layers)}")
        return layers[index]

    @contextmanager
    def _on_device(self, kind: str, index: int):
        stays = not self._offload or (kind, index) in self._loaded
        if not stays:
            self._loaded.add((kind, index))
        yield
        if not stays:
            self._loaded.remove((kind, index))

    def _added(self, samples: Tensor | None, index: int, layers: int, image: Tensor) -> Tensor:
        if samples is None:
            return image
        if not isinstance(samples, Tensor) or samples.ndim != 4:
            raise TypeError("forward(): incompatible function arguments: ControlNet samples come as one stacked tensor")
        interval = -(-layers // len(samples))
        self._check(samples[index // interval], "controlnet sample", 3, len(image))
        return image + samples[index // interval]

    def _check_streams(self, image: Tensor, text: Tensor, temb: Tensor) -> None:
        self._check(image, "hidden_states", 3)
        self._check(text, "encoder_hidden_states", 3, len(image))
        self._check_temb(temb, len(image))

    def _check_temb(self, temb: Tensor, batch: int) -> None:
        self._check(temb, "temb", 2, batch)
        assert_gemv_samples(batch)

    def _check(self, tensor: Tensor, name: str, dimensions: int, batch: int | None = None) -> None:
        """What the kernels take for granted; contiguity they would restore by a copy, which nobody should need."""
        wanted = torch.bfloat16 if self._bf16 else torch.float16
        if tensor.dtype is not wanted:
            raise TypeError(f"{name} is {tensor.dtype}, the core computes in {wanted}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        if tensor.ndim != dimensions or batch not in (None, len(tensor)):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}")

    # --- LoRA -------------------------------------------------------------------------------------------------------

    def loadDict(self, state_dict: dict[str, Tensor], partial: bool = False) -> None:
        """Take the low-rank matrices `<layer>.lora_A.weight` and `.lora_B.weight` in place of any before."""
        if not partial:
            raise ValueError("this stand-in is made with its weights")
        self._lora = dict(state_dict)
        self._fuse()

    def setLoraScale(self, skip_ranks: int, scale: float) -> None:
        if skip_ranks % 16:
            raise ValueError("skipRanks must be multiples of 16")
        self._lora_scale = scale
        self._fuse()

    def _fuse(self) -> None:
        """Give every adapted layer its weight plus the scaled product of its matrices."""
        kinds = {"transformer_blocks": self._double, "single_transformer_blocks": self._single}
        named = {f"{kind}.{i}": layer for kind, layers in kinds.items() for i, layer in enumerate(layers)}
        for name, weight in self._base.items():
            _linear(named, name).weight = nn.Parameter(weight)
        for key, down in self._lora.items():
            name, found, _ = key.partition(".lora_A.")
            if found:
                linear = _linear(named, name)
                weight = self._base.setdefault(name, linear.weight.data)
                up = self._lora[f"{name}.lora_B.weight"]
                linear.weight = nn.Parameter(weight + (self._lora_scale * (up @ down)).to(weight.dtype))


def _linear(layers: dict[str, nn.Module], name: str) -> nn.Module:
    kind, index, path = name.split(".", 2)
    return layers[f"{kind}.{index}"].get_submodule(path)
