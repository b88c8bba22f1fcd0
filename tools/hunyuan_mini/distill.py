"""Stage 4: guidance distillation (arXiv 2210.03142), so that one call stands for a guided pair, as in HunyuanVideo.

The student starts as the teacher and learns `u + w (c - u)` for the guidance w that its guidance embedding is told,
where c and u are the teacher's velocities with and without the caption. Text encoders stay as they are.
"""

from pathlib import Path

import torch

from tools.flux_mini.distill import GUIDANCE_RANGE
from tools.flux_mini.training import Average, Log, advance, cosine, resume, save, set_rate, stage_options
from tools.flux_mini.transformer import attention, optimizers, speed_up_blocks

from .latents import Pool
from .shape_aid import cell_weights
from .transformer import batch_at, load, noised


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    pool = Pool(work)
    teacher = load(work / "transformer.pt").to(device).eval().requires_grad_(False)
    student = load(work / "transformer.pt").to(device)
    trained = list(student.transformer.parameters())
    average = Average(student.parameters(), decay=0.99)  # of all, as `load` reads it, though only some change
    optims = optimizers(student.transformer, learning_rate)
    checkpoint = work / "distilled.pt"
    start = resume(checkpoint, model=student, average=average, optimizers=optims)
    speed_up_blocks(teacher.transformer, student.transformer)
    log = Log(work / "distilled.csv", ("loss",), start)
    losses = []
    for step in range(start, steps):
        set_rate(optims, learning_rate * cosine(step, steps, warmup=20))
        examples = batch_at(pool, seed + 1, step, batch, dropout=0.0)
        x, t, _ = noised(examples, device)
        low, high = GUIDANCE_RANGE
        guidance = low + (high - low) * torch.rand(batch, generator=examples.generator).to(device)
        with torch.no_grad():
            with torch.autocast(device.type, torch.bfloat16):
                told = teacher.encode(examples.prompts)
                untold = [part.expand(batch, *part.shape[1:]) for part in teacher.encode([""])]
            conditional, unconditional = (teacher(x, t, torch.ones_like(t), *text) for text in (told, untold))
            target = torch.lerp(unconditional, conditional, guidance[:, None, None, None, None])
        velocity = student(x, t, guidance, *told)
        loss = (cell_weights(examples.covered.to(device)) * (velocity - target).square()).mean()
        loss.backward()
        advance(optims, trained)
        average.update()
        losses.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == steps:
            log.write(step + 1, loss=sum(losses) / len(losses))
            losses = []
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save(checkpoint, step + 1, model=student, average=average, optimizers=optims)


def main() -> None:
    options = stage_options(__doc__, steps=600, batch=32, learning_rate=5e-4)
    with attention(options.device):
        train(options.work, options.steps, options.batch, options.learning_rate, options.seed, options.device)


if __name__ == "__main__":
    main()
