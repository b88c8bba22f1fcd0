"""Draw with every contender on the same prompts and noise, in one process, in turns; keep a record of each drawing."""

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline

from eval.errors import UserError
from eval.generation.generate import Drawing, generate
from eval.metrics.registry import Metrics

from .count import WorkCounter
from .peers import OURS, Contender, own_copy

METRICS = ("psnr", "ssim", "lpips")
CHUNK = 16  # contenders between two uncached drawings, which their times are compared with


@dataclass(frozen=True)
class Task:
    """A prompt of the set, its noise, and whether settings are being chosen on it ("tune") or compared ("test")."""

    phase: str
    id: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Record:
    """One drawing against the uncached one. `work` and `attentions` are fractions of the uncached run's; seconds are of
    denoising, `plain_seconds` the mean of the uncached drawings before and after."""

    phase: str
    contender: str
    prompt: str
    work: float
    attentions: float
    seconds: float
    plain_seconds: float
    psnr: float
    ssim: float
    lpips: float | None  # None where it cannot be had


class Records:
    """A file of one JSON object a line, the first of which says what was measured. Survives being killed."""

    def __init__(self, file: Path, subject: dict[str, Any]):
        """UserError where the file holds measurements of something else."""
        self.file = file
        self.records: list[Record] = []
        self._known: set[tuple[str, str, str]] = set()
        lines = file.read_text().splitlines() if file.is_file() else []
        if not lines:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(subject) + "\n")
            return
        if json.loads(lines[0]) != subject:
            raise UserError(
                f"{file} holds measurements of {lines[0]}, not of {json.dumps(subject)}; name another file with "
                "--records, or remove it"
            )
        for line in lines[1:]:
            with contextlib.suppress(json.JSONDecodeError):  # a line that was being written
                self.records.append(Record(**json.loads(line)))
        self._known |= {(record.phase, record.prompt, record.contender) for record in self.records}

    def add(self, records: Sequence[Record]) -> None:
        self.records += records
        self._known |= {(record.phase, record.prompt, record.contender) for record in records}
        with self.file.open("a") as file:
            file.write("".join(json.dumps(asdict(record)) + "\n" for record in records))

    def has(self, task: Task, contender: Contender) -> bool:
        return (task.phase, task.id, contender.name) in self._known


class Bench:
    """Pipelines, one transformer for each library; counts inside its `with` block."""

    def __init__(self, pipe: FluxPipeline, libraries: Sequence[str], call: dict[str, Any]):
        """RuntimeError where the count of an uncached run is not steps x blocks."""
        self.call = call
        self.metrics = Metrics(METRICS, device=pipe.device)
        self.pipes = {OURS: pipe} | {name: own_copy(pipe) for name in libraries if name != OURS}
        self.counters = {name: WorkCounter(each.transformer) for name, each in self.pipes.items()}
        self._open = contextlib.ExitStack()
        self._checked: set[str] = set()

    def __enter__(self) -> "Bench":
        for counter in self.counters.values():
            self._open.enter_context(counter)
        config = self.pipes[OURS].transformer.config
        self._draw(OURS, Task("warm-up", "", "warm-up", 0))
        blocks = config.num_layers + config.num_single_layers
        if self.counters[OURS].attentions != blocks * self.call["num_inference_steps"]:
            raise RuntimeError(f"an uncached run counted {self.counters[OURS].attentions} attentions")
        self._whole = self.counters[OURS].multiply_adds, self.counters[OURS].attentions
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def measure(self, task: Task, contenders: Sequence[Contender]) -> Iterator[list[Record]]:
        """Records of all, a few at a time, in an order that differs from prompt to prompt."""
        order = random.Random(task.seed).sample(contenders, len(contenders))
        before = self._draw(OURS, task)
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            drawn = [self._draw_with(contender, task, before) for contender in chunk]
            after = self._draw(OURS, task)
            seconds = (before.denoising_seconds + after.denoising_seconds) / 2
            yield [
                self._record(task, contender, drawing, work, seconds, before)
                for contender, (drawing, work) in zip(chunk, drawn, strict=True)
            ]
            before = after

    def _draw(self, library: str, task: Task) -> Drawing:
        self.counters[library].reset()
        return generate(self.pipes[library], task.prompt, task.seed, **self.call)

    def _draw_with(self, contender: Contender, task: Task, plain: Drawing) -> tuple[Drawing, tuple[float, float]]:
        counter = self.counters[contender.library]
        with contender.attach(self.pipes[contender.library]):
            drawing = self._draw(contender.library, task)
        work = counter.multiply_adds / self._whole[0], counter.attentions / self._whole[1]
        kind = f"{contender.library} {contender.method}"
        if kind not in self._checked:  # the first time that a method was there: nothing may remain of it
            self._checked.add(kind)
            if self._draw(contender.library, task).image.tobytes() != plain.image.tobytes():
                raise RuntimeError(f"{contender.name}: the model draws another image after it was removed")
        return drawing, work

    def _record(
        self,
        task: Task,
        contender: Contender,
        drawing: Drawing,
        work: tuple[float, float],
        plain_seconds: float,
        plain: Drawing,
    ) -> Record:
        scores = {
            name: None
            if name in self.metrics.unavailable
            else self.metrics.score(name, drawing.image, plain.image, task.prompt, None)
            for name in METRICS
        }
        return Record(task.phase, contender.name, task.id, *work, drawing.denoising_seconds, plain_seconds, **scores)
