"""Stage 1: a LoRA on flux-mini with which a few Euler steps end where the teacher's many end.

The gradient goes through the whole run of the student. A student that learns each of its steps by itself comes nearer
to the teacher's latents on the way, and not at the end.
"""

import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from torch.func import functional_call

from tools.flux_mini.training import Average, Log, advance, cosine, resume, save, set_rate, stage_options
from tools.flux_mini.transformer import attention, speed_up_blocks

from .recipe import BASE, GUIDANCE, PIXELS, STEPS, TRAINING
from .teach import CHUNK, examples

RANK = 32
EXAMPLES, HELD_OUT = 112 * CHUNK, 2 * CHUNK  # the first of them are held out
WARMUP, DECAY = 40, 0.98  # steps; of the averaged weights
LOOK = 25  # steps between two looks at the held-out examples
SMALL = 1e-8  # keeps the gradient of a root finite


class Student(torch.nn.Module):
    """flux-mini's transformer and a LoRA for all its matrices, which changes nothing yet; only the LoRA is trained.

    Fields:
        levels: (STEPS + 1,) noise levels, as the pipeline has them.
    """

    def __init__(self, pipe: FluxPipeline) -> None:
        super().__init__()
        self._outside = [pipe.transformer.requires_grad_(False)]
        layers = {name: layer for name, layer in pipe.transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
        self.names, self.fixed = list(layers), [layer.weight for layer in layers.values()]
        self.down, self.up = torch.nn.ParameterList(), torch.nn.ParameterList()
        for weight in self.fixed:
            down = weight.new_empty(RANK, weight.shape[1])
            self.down.append(torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5)))
            self.up.append(weight.new_zeros(weight.shape[0], RANK))
        side = PIXELS // 16
        self.image_ids = pipe._prepare_latent_image_ids(1, side, side, pipe.device, torch.float32)
        mu = pipe.scheduler.config.base_shift  # that of as few image tokens
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=mu)
        self.levels = pipe.scheduler.sigmas.to(pipe.device)

    @property
    def base(self) -> torch.nn.Module:
        return self._outside[0]

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, 64, 64): the latents in which the student's Euler steps from `batch["noise"]` end."""
        latents, size = batch["noise"], len(batch["noise"])
        # Merged once for all calls: with matrices this small that costs less than the LoRA's own products.
        merged = {
            f"{name}.weight": weight + up @ down
            for name, weight, down, up in zip(self.names, self.fixed, self.down, self.up, strict=True)
        }
        for level, following in pairwise(self.levels):
            inputs = {
                "hidden_states": latents,
                "timestep": level.expand(size),
                "guidance": torch.full_like(level, GUIDANCE).expand(size),
                "pooled_projections": batch["pooled"],
                "encoder_hidden_states": batch["states"],
                "txt_ids": latents.new_zeros(batch["states"].shape[1], 3),
                "img_ids": self.image_ids,
            }
            velocity = functional_call(self.base, merged, (), inputs).sample
            latents = latents + (following - level) * velocity.float()
        return latents


def distance(model: Student, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B,): RMS distance of the latents in which the student's runs end from the teacher's."""
    return ((model(batch) - batch["ends"]).square().mean((1, 2)) + SMALL).sqrt()


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    known = {name: part.to(device) for name, part in examples(work, EXAMPLES).items()}
    model = Student(FluxPipeline.from_pretrained(BASE, dtype=torch.float32).to(device))
    parameters = list(model.parameters())
    average, optims = Average(parameters, DECAY), [torch.optim.AdamW(parameters, learning_rate, (0.9, 0.99))]
    checkpoint = work / "distilled.pt"
    start = resume(checkpoint, model=model, average=average, optimizers=optims)
    speed_up_blocks(model.base)
    log = Log(work / "distilled.csv", ("trained", "held_out"), start)

    def look() -> float:
        """Of the averaged weights."""
        own = [parameter.detach().clone() for parameter in parameters]
        average.copy_to_model()
        # As in training, so that nothing is compiled again.
        found = [distance(model, part(range(at, at + batch))).detach() for at in range(0, HELD_OUT, batch)]
        torch._foreach_copy_([parameter.data for parameter in parameters], own)
        return torch.cat(found).mean().item()

    def part(rows: range | list[int]) -> dict[str, torch.Tensor]:
        return {name: tensor[list(rows)] for name, tensor in known.items()}

    if start == 0:
        log.write(0, held_out=look())
    found = []
    for step in range(start, steps):
        set_rate(optims, learning_rate * cosine(step, steps, WARMUP))
        rows = random.Random(f"distilled-{seed}-{step}").sample(range(HELD_OUT, EXAMPLES), batch)
        missed = distance(model, part(rows))
        # The square is for the few runs that end in another image: they would hardly weigh more than the others.
        (missed + missed.square()).mean().backward()
        advance(optims, parameters)
        average.update()
        found.append(missed.mean().item())
        if (step + 1) % LOOK == 0 or step + 1 == steps:
            log.write(step + 1, trained=sum(found) / len(found), held_out=look())
            save(checkpoint, step + 1, model=model, average=average, optimizers=optims)
            found = []


def main() -> None:
    options = stage_options(__doc__, steps=TRAINING["steps"], batch=TRAINING["batch"], learning_rate=5e-4)
    with attention(options.device):
        train(options.work, options.steps, options.batch, options.learning_rate, options.seed, options.device)


if __name__ == "__main__":
    main()
