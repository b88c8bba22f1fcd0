"""What every training stage shares: a learning-rate schedule, an exponential average, checkpoints that survive a
kill."""

import csv
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch


def atomic_save(state: object, path: Path) -> None:
    """`torch.save` that leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


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
