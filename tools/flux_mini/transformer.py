"""Stage 4: the transformer with its text encoders, trained from scratch and together by rectified flow.

`x_t = (1 - t) x_0 + t noise`, target `noise - x_0`; t is logit-normal under the shift that sampling uses at 64 tokens
(arXiv 2403.03206). Matrices are trained by Muon, everything else by AdamW.
"""

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import text
from .latents import Pool
from .scenes import caption
from .training import Average, Log, advance, cosine, resume, save, set_rate, stage_options

TOKENS = 64
SHIFT = 0.5
CAPTION_DROPOUT = 0.1


class Denoiser(torch.nn.Module):
    """Everything that is trained in this stage: prompt in, velocity out."""

    def __init__(self) -> None:
        super().__init__()
        self.t5_tokenizer = text.build_t5_tokenizer()
        self.clip_tokenizer = text.build_clip_tokenizer()
        self.t5 = text.build_t5(self.t5_tokenizer)
        self.clip = text.build_clip(self.clip_tokenizer)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=6,
            num_single_layers=12,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=text.WIDTH,
            pooled_projection_dim=text.WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 14, 14),
        )
        self._start_as_identity()
        rows = torch.arange(8)
        ids = torch.stack([torch.zeros(8, 8), rows[:, None].expand(8, 8), rows[None, :].expand(8, 8)], dim=-1)
        self.register_buffer("image_ids", ids.reshape(TOKENS, 3), persistent=False)
        self.register_buffer("text_ids", torch.zeros(text.T5_LENGTH, 3), persistent=False)

    def _start_as_identity(self) -> None:
        """AdaLN-zero (arXiv 2212.09748): every gate starts at zero, so each block starts as the identity."""
        for name, module in self.transformer.named_modules():
            is_modulation = name.endswith(".linear") and ("norm" in name)
            if isinstance(module, torch.nn.Linear) and (is_modulation or name == "proj_out"):
                torch.nn.init.zeros_(module.weight)
                torch.nn.init.zeros_(module.bias)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 40, 128) T5 states and (B, 128) pooled CLIP states, padded as FluxPipeline pads."""

        def ids(tokenizer, length: int) -> torch.Tensor:
            batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            return batch.input_ids

        states = self.t5(ids(self.t5_tokenizer, text.T5_LENGTH))[0]
        return states, self.clip(ids(self.clip_tokenizer, text.CLIP_LENGTH)).pooler_output

    def forward(self, x, t, guidance, states, pooled) -> torch.Tensor:
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=t,
            guidance=guidance,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
        ).sample


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal t under FLUX's exponential shift: `exp(mu) / (exp(mu) + 1/t - 1)`."""
    t = torch.sigmoid(torch.randn(count, generator=generator))
    shift = math.exp(SHIFT)
    return shift / (shift + 1 / t - 1)


def examples(
    pool: Pool, seed: int, step: int, batch: int, dropout: float
) -> tuple[torch.Tensor, list[str], torch.Generator]:
    """Latents (B, 64, 64), captions and the generator of this step's noise: a function of seed and step."""
    rng = random.Random(f"batch-{seed}-{step}")
    indices = [rng.randrange(len(pool)) for _ in range(batch)]
    prompts = ["" if rng.random() < dropout else caption(pool.scene(i), rng) for i in indices]
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    return torch.from_numpy(pool.packed[indices]).float(), prompts, generator


def optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = "blocks." in name or "layers." in name or ".block." in name
        (matrices if parameter.ndim == 2 and inner and "relative_attention" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    pool, model = Pool(work), Denoiser()
    trained = [p for p in model.parameters() if p.requires_grad]
    average, optims = Average(trained), optimizers(model, learning_rate)
    checkpoint = work / "transformer.pt"
    start = resume(checkpoint, model=model, average=average, optimizers=optims)
    log = Log(work / "transformer.csv", ("loss", "grad_norm"), start)
    losses, norms = [], []
    for step in range(start, steps):
        set_rate(optims, learning_rate * cosine(step, steps))
        x0, prompts, generator = examples(pool, seed, step, batch, CAPTION_DROPOUT)
        noise = torch.randn(x0.shape, generator=generator)
        t = noise_levels(batch, generator)
        x = torch.lerp(x0, noise, t[:, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(x, t, torch.ones(batch), *model.encode(prompts))
        loss = F.mse_loss(velocity.float(), noise - x0)
        loss.backward()
        norms.append(advance(optims, trained))
        average.update()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log.write(step + 1, loss=sum(losses) / len(losses), grad_norm=sum(norms) / len(norms))
            losses, norms = [], []
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save(checkpoint, step + 1, model=model, average=average, optimizers=optims)


def load(checkpoint: Path) -> Denoiser:
    """The averaged weights of a stage's checkpoint."""
    model = Denoiser()
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    average = Average(model.parameters())
    average.load_state_dict(state["average"])
    average.copy_to_model()
    return model


def main() -> None:
    options = stage_options(__doc__, steps=2800, batch=48, learning_rate=2e-3)
    # The CPU's fused attention spends more in its backward pass than all the matrices of a model this small.
    with sdpa_kernel(SDPBackend.MATH):
        train(options.work, options.steps, options.batch, options.learning_rate, options.seed)


if __name__ == "__main__":
    main()
