"""Stage 3: the transformer with its text encoders, trained from scratch and together by rectified flow.

`x_t = (1 - t) x_0 + t noise`, target `noise - x_0`; t is logit-normal under the shift that sampling uses at 64 tokens
(arXiv 2403.03206). Matrices are trained by Muon, everything else by AdamW. Where the letters belong is taught beside
the flow (`spelling.py`).
"""

import math
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from . import spelling, text
from .latents import Pool
from .scenes import Letter, caption, letter_boxes
from .training import Average, Log, advance, averaged, cosine, resume, save, set_rate, stage_options

TOKENS = 64
SHIFT = 0.5
CAPTION_DROPOUT = 0.1
COLUMNS = ("loss", "flow", "cell", "place", "grad_norm")


class Denoiser(torch.nn.Module):
    """Everything that is trained in this stage: prompt in, velocity out."""

    def __init__(self) -> None:
        super().__init__()
        self.t5_tokenizer = text.build_t5_tokenizer()
        self.clip_tokenizer = text.build_clip_tokenizer(text.corpus(), text.CLIP_LENGTH)
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
        start_as_identity(self.transformer)
        rows = torch.arange(8)
        ids = torch.stack([torch.zeros(8, 8), rows[:, None].expand(8, 8), rows[None, :].expand(8, 8)], dim=-1)
        self.register_buffer("image_ids", ids.reshape(TOKENS, 3), persistent=False)
        self.register_buffer("text_ids", torch.zeros(text.T5_LENGTH, 3), persistent=False)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 40, 128) T5 states and (B, 128) pooled CLIP states, padded as FluxPipeline pads."""

        states = self.t5(self.t5_ids(prompts))[0]
        return states, self.clip(self._ids(self.clip_tokenizer, prompts, text.CLIP_LENGTH)).pooler_output

    def t5_ids(self, prompts: list[str]) -> torch.Tensor:
        """(B, 40)"""
        return self._ids(self.t5_tokenizer, prompts, text.T5_LENGTH)

    def _ids(self, tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int) -> torch.Tensor:
        batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return batch.input_ids.to(self.image_ids.device)

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


def start_as_identity(transformer: torch.nn.Module) -> None:
    """AdaLN-zero (arXiv 2212.09748): every gate starts at zero, so each block starts as the identity."""
    for name, module in transformer.named_modules():
        is_modulation = name.endswith(".linear") and ("norm" in name)
        if isinstance(module, torch.nn.Linear) and (is_modulation or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def noise_levels(count: int, generator: torch.Generator, shift: float = math.exp(SHIFT)) -> torch.Tensor:
    """(count,) logit-normal t under the shift that sampling uses: `shift / (shift + 1/t - 1)`."""
    t = torch.sigmoid(torch.randn(count, generator=generator))
    return shift / (shift + 1 / t - 1)


@dataclass
class Batch:
    """What one step is trained on: a function of the pool, a seed and the step."""

    latents: torch.Tensor  # (B, 64, 64), clean
    prompts: list[str]  # some of them dropped, that is ""
    letters: list[list[Letter]]  # of the words of the prompts; none where dropped
    maps: torch.Tensor  # (B, 64, 16), see spelling.py
    generator: torch.Generator  # of this step's noise


def batch_at(pool: Pool, seed: int, step: int, size: int, dropout: float) -> Batch:
    rng = random.Random(f"batch-{seed}-{step}")
    indices = [rng.randrange(len(pool)) for _ in range(size)]
    scenes = [pool.scene(i) for i in indices]
    prompts = ["" if rng.random() < dropout else caption(scene, rng) for scene in scenes]
    return Batch(
        torch.from_numpy(pool.packed[indices]).float(),
        prompts,
        [letter_boxes(scene) if prompt else [] for scene, prompt in zip(scenes, prompts, strict=True)],
        spelling.token_maps(torch.from_numpy(pool.letters[indices])),
        torch.Generator().manual_seed(rng.getrandbits(62)),
    )


def optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = "blocks." in name or "layers." in name or ".block." in name
        (matrices if parameter.ndim == 2 and inner and "relative_attention" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def speed_up_blocks(*transformers: torch.nn.Module) -> None:
    """Compile the blocks, a third less time a step on a CPU, and let them alone compute in bfloat16.

    What embeds the timestep and the guidance, and what gives the velocity, stays in float32: in bfloat16 the embeddings
    of neighbouring timesteps are rounded to 8 bits.
    """
    for transformer in transformers:
        autocast = torch.autocast(transformer.device.type, torch.bfloat16)
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.forward = autocast(block.forward)
            block.compile()


def attention(device: torch.device) -> AbstractContextManager:
    """The CPU's fused attention spends more in its backward pass than all the matrices of a model this small."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    pool, model = Pool(work), Denoiser().to(device)
    aid = spelling.SpellingAid(model.transformer, model.t5_tokenizer, text.WIDTH).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    average, optims = Average(trained), [*optimizers(model, learning_rate), torch.optim.AdamW(aid.parameters())]
    checkpoint = work / "transformer.pt"
    start = resume(checkpoint, model=model, aid=aid, average=average, optimizers=optims)
    speed_up_blocks(model.transformer)
    log = Log(work / "transformer.csv", COLUMNS, start)
    totals = dict.fromkeys(COLUMNS, 0.0)
    since = start
    for step in range(start, steps):
        set_rate(optims, learning_rate * cosine(step, steps))
        examples = batch_at(pool, seed, step, batch, CAPTION_DROPOUT)
        x0, maps = examples.latents.to(device), examples.maps.to(device)
        noise = torch.randn(x0.shape, generator=examples.generator).to(device)
        t = noise_levels(batch, examples.generator).to(device)
        x = torch.lerp(x0, noise, t[:, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            states, pooled = model.encode(examples.prompts)
        velocity = model(x, t, torch.ones_like(t), states, pooled)
        with torch.autocast(device.type, torch.bfloat16):
            cell, place = aid(model.t5_ids(examples.prompts), states, examples.letters, maps)
        error = (velocity - (noise - x0)).square()
        flow = (spelling.token_weights(maps) * error).mean()
        (flow + spelling.CELL_LOSS * cell + spelling.PLACE_LOSS * place).backward()
        norm = advance(optims, trained)
        average.update()
        for name, value in (("loss", error.mean()), ("flow", flow), ("cell", cell), ("place", place)):
            totals[name] += value.item()
        totals["grad_norm"] += norm
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log.write(step + 1, **{name: total / (step + 1 - since) for name, total in totals.items()})
            totals, since = dict.fromkeys(COLUMNS, 0.0), step + 1
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save(checkpoint, step + 1, model=model, aid=aid, average=average, optimizers=optims)


def load(checkpoint: Path) -> Denoiser:
    """The averaged weights of a stage's checkpoint."""
    return averaged(Denoiser(), checkpoint)


def main() -> None:
    options = stage_options(__doc__, steps=12_000, batch=48, learning_rate=2e-3)
    with attention(options.device):
        train(options.work, options.steps, options.batch, options.learning_rate, options.seed, options.device)


if __name__ == "__main__":
    main()
