"""Stage 3: the transformer with its text encoders, trained from scratch and together by rectified flow.

`x_t = (1 - t) x_0 + t noise`, target `noise - x_0`; t is logit-normal under the shift that sampling uses (arXiv
2403.03206). Matrices are trained by Muon, everything else by AdamW, as flux-mini's are. Which shape belongs where is
taught beside the flow (`shape_aid.py`).
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from transformers import PreTrainedTokenizerBase

from h2cache.eval.metrics.motions import SHAPES
from tools.flux_mini.text import build_clip
from tools.flux_mini.training import Average, Log, advance, averaged, cosine, resume, save, set_rate, stage_options
from tools.flux_mini.transformer import attention, noise_levels, optimizers, speed_up_blocks, start_as_identity

from . import shape_aid, text
from .clips import caption
from .latents import Pool

SHIFT = 2.0
CAPTION_DROPOUT = 0.1
COLUMNS = ("loss", "flow", "cell", "grad_norm")
TIMESTEPS = 1000  # of t = 1, and of guidance 1, as the pipeline tells them to the transformer


class Denoiser(torch.nn.Module):
    """Everything that is trained in this stage: prompt in, velocity out."""

    def __init__(self) -> None:
        super().__init__()
        self.llama_tokenizer = text.build_llama_tokenizer()
        self.clip_tokenizer = text.build_hunyuan_clip_tokenizer()
        self.llama = text.build_llama(self.llama_tokenizer)
        self.clip = build_clip(self.clip_tokenizer)
        self.transformer = HunyuanVideoTransformer3DModel(
            num_layers=4,
            num_single_layers=6,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            attention_head_dim=32,
            num_attention_heads=4,
            text_embed_dim=text.WIDTH,
            pooled_projection_dim=text.WIDTH,
            guidance_embeds=True,
            rope_axes_dim=(8, 12, 12),
        )
        start_as_identity(self.transformer)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, 24, 128) Llama states, their mask (B, 24), and (B, 128) pooled CLIP states, as HunyuanVideoPipeline makes
        them."""
        tokens = self._tokens(self.llama_tokenizer, prompts, max_length=text.LLAMA_LENGTH, padding="max_length")
        states = self.llama(**tokens, output_hidden_states=True).hidden_states[-(text.SKIPPED_LAYERS + 1)]
        # CLIP looks back alone, and its pooled state is the first end's: what is padded after it changes nothing.
        tail = self._tokens(self.clip_tokenizer, prompts, max_length=text.CLIP_LENGTH, padding="longest")
        return states, tokens["attention_mask"].float(), self.clip(**tail).pooler_output

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **how: object) -> dict:
        batch = tokenizer(prompts, truncation=True, return_tensors="pt", **how).to(self.transformer.device)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def forward(self, x, t, guidance, states, mask, pooled) -> torch.Tensor:
        return self.transformer(
            hidden_states=x,
            timestep=t * TIMESTEPS,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            pooled_projections=pooled,
            guidance=guidance * TIMESTEPS,
        ).sample


@dataclass
class Batch:
    """What one step is trained on: a function of the pool, a seed and the step."""

    latents: torch.Tensor  # (B, 16, 5, 8, 8), clean
    prompts: list[str]  # some of them dropped, that is ""
    covered: torch.Tensor  # (B, 5, 8, 8), see shape_aid.py
    shapes: torch.Tensor  # (B,), in SHAPES
    generator: torch.Generator  # of this step's noise


def batch_at(pool: Pool, seed: int, step: int, size: int, dropout: float) -> Batch:
    rng = random.Random(f"batch-{seed}-{step}")
    indices = [rng.randrange(len(pool)) for _ in range(size)]
    clips = [pool.clip(i) for i in indices]
    prompts = ["" if rng.random() < dropout else caption(clip, rng) for clip in clips]
    return Batch(
        torch.from_numpy(pool.latents[indices]).float(),
        prompts,
        torch.from_numpy(pool.covered[indices]),
        torch.tensor([SHAPES.index(clip.shape) for clip in clips]),
        torch.Generator().manual_seed(rng.getrandbits(62)),
    )


def noised(examples: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, t, and the velocity that the straight way from clean latents to noise has."""
    x0 = examples.latents.to(device)
    noise = torch.randn(x0.shape, generator=examples.generator).to(device)
    t = noise_levels(len(x0), examples.generator, SHIFT).to(device)
    return torch.lerp(x0, noise, t[:, None, None, None, None]), t, noise - x0


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    pool, model = Pool(work), Denoiser().to(device)
    aid = shape_aid.ShapeAid(model.transformer, text.WIDTH).to(device)
    trained = list(model.parameters())
    average, optims = Average(trained), [*optimizers(model, learning_rate), torch.optim.AdamW(aid.parameters())]
    checkpoint = work / "transformer.pt"
    start = resume(checkpoint, model=model, aid=aid, average=average, optimizers=optims)
    speed_up_blocks(model.transformer)
    log = Log(work / "transformer.csv", COLUMNS, start)
    totals, since = dict.fromkeys(COLUMNS, 0.0), start
    for step in range(start, steps):
        set_rate(optims, learning_rate * cosine(step, steps))
        examples = batch_at(pool, seed, step, batch, CAPTION_DROPOUT)
        x, t, target = noised(examples, device)
        told = torch.tensor([bool(prompt) for prompt in examples.prompts], device=device)
        covered = examples.covered.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            states = model.encode(examples.prompts)
        velocity = model(x, t, torch.ones_like(t), *states)
        cell = aid(told, covered, examples.shapes.to(device))
        error = (velocity - target).square()
        flow = (shape_aid.cell_weights(covered) * error).mean()
        (flow + shape_aid.CELL_LOSS * cell).backward()
        norm = advance(optims, trained)
        average.update()
        for name, value in (("loss", error.mean()), ("flow", flow), ("cell", cell)):
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
    options = stage_options(__doc__, steps=18500, batch=48, learning_rate=2e-3)
    with attention(options.device):
        train(options.work, options.steps, options.batch, options.learning_rate, options.seed, options.device)


if __name__ == "__main__":
    main()
