"""The transformers that `benchmarks.engine` measures on, and endless denoising loops around them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.clock import seconds
from h2cache.eval.files import REPOSITORY


@dataclass(frozen=True)
class Subject:
    """A transformer, and what it is called with.

    Fields:
        name: as the table has it.
        transformer: in eval mode.
        inputs: of a call, without the timestep.
        depths: the fields of its configuration that hold the length of each block list.
        timestep: what the model calls the beginning of a run.
        tokens: of the image or video, and of the text where it is a stream.
        repeats: how often each case is timed.
    """

    name: str
    transformer: nn.Module
    inputs: dict[str, Any]
    depths: tuple[str, ...]
    timestep: float
    tokens: tuple[int, int]
    repeats: int

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def copy(self, depths: tuple[int, ...] | None = None) -> nn.Module:
        """Another transformer with the same weights, not copied; with `depths`, only so many blocks of each list."""
        changes = {} if depths is None else dict(zip(self.depths, depths, strict=True))
        with torch.device("meta"):
            other = type(self.transformer).from_config(self.transformer.config, **changes)
        other.load_state_dict(self.transformer.state_dict(), strict=False, assign=True)
        for name, buffer in self.transformer.named_buffers():  # those that are not saved
            owner, _, key = name.rpartition(".")
            setattr(other.get_submodule(owner), key, buffer)
        return other.eval()


class Loop:
    """An endless denoising run of one transformer: every call is one step later than the call before."""

    def __init__(self, subject: Subject, transformer: nn.Module | None = None):
        self.transformer = subject.transformer if transformer is None else transformer
        self.subject = subject
        # Objects of its own: they name the run.
        self.inputs = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in subject.inputs.items()
        }
        self.time = 1.0

    def step(self) -> float:
        """Seconds of one call."""
        self.time -= 1e-6
        time, device = self.time * self.subject.timestep, self.subject.device
        timestep = torch.full((1,), time, device=device, dtype=torch.float32)
        return seconds(lambda: self.transformer(timestep=timestep, **self.inputs, return_dict=False), device)


def flux_inputs(transformer: FluxTransformer2DModel, side: int, text_tokens: int) -> dict[str, Any]:
    config, device = transformer.config, transformer.device
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")

    def features(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, transformer.dtype)

    return {
        "hidden_states": features(side**2, config.in_channels),
        "encoder_hidden_states": features(text_tokens, config.joint_attention_dim),
        "pooled_projections": features(config.pooled_projection_dim),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": torch.stack([torch.zeros(side**2), rows.flatten(), columns.flatten()], dim=-1).to(device),
        "txt_ids": torch.zeros(text_tokens, 3, device=device),
    }


def flux_subject(name: str, transformer: FluxTransformer2DModel, side: int, text_tokens: int, repeats: int) -> Subject:
    inputs = flux_inputs(transformer, side, text_tokens)
    depths = ("num_layers", "num_single_layers")
    return Subject(name, transformer, inputs, depths, 1.0, (side**2, text_tokens), repeats)


def flux_mini(repeats: int) -> Subject:
    transformer = FluxTransformer2DModel.from_pretrained(REPOSITORY / "assets/flux-mini", subfolder="transformer")
    return flux_subject("flux-mini, float32", transformer.float().eval(), 8, 40, repeats)


def mid_size_flux(repeats: int) -> Subject:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=4,
        num_single_layers=8,
        num_attention_heads=6,
        attention_head_dim=64,
        guidance_embeds=True,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        axes_dims_rope=(8, 28, 28),
    )
    name = "mid-size Flux (384 wide, 4 + 8 blocks), float32"
    return flux_subject(name, transformer.eval(), 16, 64, max(20, repeats // 5))


def mid_size_wan(repeats: int) -> Subject:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=96, num_layers=10, ffn_dim=1536, text_dim=256, freq_dim=256
    ).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 4, 16, 20, generator=generator),
        "encoder_hidden_states": torch.randn(1, 64, 256, generator=generator),
    }
    name = "mid-size Wan (384 wide, 10 blocks), float32"
    return Subject(name, transformer, inputs, ("num_layers",), 1000.0, (320, 0), max(20, repeats // 5))


def mid_size_hunyuan_video(repeats: int) -> Subject:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=6,
        attention_head_dim=64,
        num_layers=4,
        num_single_layers=8,
        num_refiner_layers=1,
        patch_size=2,
        guidance_embeds=True,
        text_embed_dim=256,
        pooled_projection_dim=256,
        rope_axes_dim=(16, 24, 24),
    ).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 4, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 48, 256, generator=generator),
        "encoder_attention_mask": torch.ones(1, 48, dtype=torch.bool),
        "pooled_projections": torch.randn(1, 256, generator=generator),
        "guidance": torch.full((1,), 6000.0),
    }
    name = "mid-size HunyuanVideo (384 wide, 4 + 8 blocks), float32"
    depths = ("num_layers", "num_single_layers")
    return Subject(name, transformer, inputs, depths, 1000.0, (256, 48), max(20, repeats // 5))


def flux1_dev(repeats: int, compiled: bool) -> Subject:
    """FLUX.1-dev at 1024x1024, its weights drawn at random where they will stay: they would take minutes on a CPU."""
    transformer = on_gpu(lambda: FluxTransformer2DModel(guidance_embeds=True), compiled)
    name = f"FLUX.1-dev, bfloat16, {'compiled blocks' if compiled else 'eager'}"
    return flux_subject(name, transformer, 64, 512, max(10, repeats // 10))


def wan_1_3b(repeats: int, compiled: bool) -> Subject:
    """Wan 2.1 T2V 1.3B at 480x832, 81 frames."""
    transformer = on_gpu(lambda: WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960), compiled)
    inputs = {
        "hidden_states": torch.randn(1, 16, 21, 60, 104, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16),
    }
    name = f"Wan 2.1 T2V 1.3B, bfloat16, {'compiled blocks' if compiled else 'eager'}"
    return Subject(name, transformer, inputs, ("num_layers",), 1000.0, (21 * 30 * 52, 0), max(5, repeats // 40))


def on_gpu(make: Callable[[], nn.Module], compiled: bool) -> nn.Module:
    """The model in bfloat16, with random weights."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        transformer = make().to(torch.bfloat16).eval()
    if compiled:
        transformer.compile_repeated_blocks()
    return transformer
