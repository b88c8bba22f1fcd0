"""What every training stage shares: options, a schedule, an average of the weights, checkpoints that survive a kill."""

import argparse
import csv
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)


def atomic_save(state: object, path: Path) -> None:
    """`torch.save` that leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def recipe_options(description: str, folder: str) -> argparse.Namespace:
    """The command line of a whole recipe; what it makes goes to `folder` unless the user says otherwise."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of the training stages: cpu or cuda")
    return parser.parse_args()


def run_stages(
    package: str, stages: Sequence[tuple[str, Mapping[str, int | float]]], options: argparse.Namespace
) -> None:
    """Run each stage of a recipe, a module of `package`, in a process of its own; CalledProcessError if one fails.

    Args:
        package: where the stages are, such as "tools.flux_mini".
        stages: name and settings of each, in order.
        options: what `recipe_options` gave.
    """
    for stage, settings in stages:
        arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", f"{package}.{stage}", "--work", str(options.work), *arguments]
        subprocess.run([*command, "--threads", str(options.threads), "--device", str(options.device)], check=True)


def stage_options(description: str, *, steps: int, batch: int, learning_rate: float) -> argparse.Namespace:
    """The command line of a stage, with its defaults; sets the number of threads.

    A GPU (`--device cuda`) trains in bfloat16 as the CPU does; give it larger batches.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def set_rate(optimizers: Sequence[torch.optim.Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def advance(optimizers: Sequence[torch.optim.Optimizer], parameters: Iterable[torch.nn.Parameter]) -> float:
    """One clipped update from the gradients that are there, which it clears; returns their norm."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


def save(checkpoint: Path, step: int, **parts: object) -> None:
    """Write a checkpoint of everything in `parts` that has, or is a list of what has, a state."""
    state = {
        name: [item.state_dict() for item in part] if isinstance(part, list) else part.state_dict()
        for name, part in parts.items()
    }
    atomic_save(state | {"step": step}, checkpoint)


def resume(checkpoint: Path, **parts: object) -> int:
    """Load what `save` wrote into the same parts; the step to go on from, 0 without a checkpoint."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    for name, part in parts.items():
        for item, saved in zip(part, state[name], strict=True) if isinstance(part, list) else [(part, state[name])]:
            item.load_state_dict(saved)
    return state["step"]


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine from 1 to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class Average:
    """Exponential moving average of a model's parameters, with the usual warm-up of its decay."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float = 0.999):
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        torch._foreach_copy_([p.data for p in self.parameters], self.shadow)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.shadow, state["shadow"])
        self.updates = state["updates"]


def averaged(model: Model, checkpoint: Path) -> Model:
    """`model` with the averaged weights of a stage's checkpoint."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    average = Average(model.parameters())
    average.load_state_dict(state["average"])
    average.copy_to_model()
    return model


class Log:
    """Appends one CSV row a call and prints it; on resume, rows past the checkpoint's step are dropped."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, ("step", "seconds", *columns))
        self.writer.writeheader()
        self.writer.writerows(kept)
        self.offset = float(kept[-1]["seconds"]) if kept else 0.0
        self.started = time.monotonic()

    def write(self, step: int, **values: float) -> None:
        row = {"step": step, "seconds": round(self.offset + time.monotonic() - self.started, 1)}
        row |= {name: f"{value:.5g}" for name, value in values.items()}
        self.writer.writerow(row)
        self.file.flush()
        print(row, flush=True)
