"""A sweep to watch: its images, what is told to who watches, and what two sweeps must have in common."""

import os
import signal
from collections.abc import Sequence
from dataclasses import fields

from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig, TaylorSeerConfig
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.generation.records import Cell, Record
from h2cache.eval.generation.sweep import Batch
from h2cache.policy.stages import Stage

STEPS = 4
PROMPTS = [Prompt("a", "a red sign"), Prompt("b", "a green wall")]
METHODS = [None, H2CacheConfig(tau1=0.3, tau2=0.35), TaylorSeerConfig(interval=2, first_enhance=1)]
CELLS = [Cell(prompt, seed, STEPS, method) for seed, prompt in enumerate(PROMPTS) for method in METHODS]


class Diary:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def has(self, batches: Sequence[Batch]) -> None:
        self.events.append([len(batch) for batch in batches])

    def loads(self, done: int, total: int) -> None:
        pass

    def begins(self, cell: Cell) -> None:
        self.events.append(cell)

    def steps(self, done: int, total: int) -> None:
        self.events.append((done, total))

    def ends(self, cell: Cell, reason: str | None) -> None:
        self.events.append(reason or "drawn")


def timeless(records: dict[str, Record]) -> dict[str, dict]:
    """All that two runs must have in common: everything but paths and seconds."""
    timed = ("image", "trace", "text_seconds", "denoising_seconds", "vae_seconds", "cold_seconds")
    kept = [field.name for field in fields(Record) if field.name not in timed]
    return {name: {field: getattr(record, field) for field in kept} for name, record in records.items()}


class Deadly(BlockCacheConfig):
    """A method that ends the process which draws with it."""

    def compose(self) -> tuple[Stage, ...]:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().compose()
