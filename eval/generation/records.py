"""What a run has drawn, kept so that nothing is lost, drawn twice or mixed up: the folder `records`.

An image is three files named by its fingerprint: PNG, trace (CSV; of our methods alone) and record (JSON). The record
comes last and holds what the others must contain, so an image without a record was never drawn, and one that does not
match its record is drawn again. What else is drawn has another fingerprint, and so other files.
"""

import fcntl
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from h2cache import CacheConfig
from h2cache.eval.errors import UserError
from h2cache.eval.files import atomic_files
from h2cache.eval.generation.backends import Method
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.generation.videos import notes_of
from h2cache.eval.models.weights import Weights

FORMAT = 1  # of the records; a change of what is drawn or stored raises it, so that older ones are not read
NAME_LENGTH = 24  # hexadecimal digits of a fingerprint
HASHED = 2**18  # bytes up to which a file is hashed whenever it is read
ENDS = {".png": b"\x00\x00\x00\x00IEND\xaeB`\x82", ".csv": b"\n"}


@dataclass(frozen=True)
class Cell:
    """One image to draw.

    Fields:
        method: None without a cache.
        scheduler: one of `h2cache.eval.models.schedulers.NAMES`; None: the pipeline's own.
        weights: what the model's are changed to; None: they are its own.
        call: arguments of the pipeline's call that are not the model's, such as (("height", 96),).
    """

    prompt: Prompt
    seed: int
    steps: int
    method: Method | None
    scheduler: str | None = None
    weights: Weights | None = None
    call: tuple[tuple[str, Any], ...] = ()

    @property
    def images(self) -> int:
        """How many the call draws at a time: its batch."""
        return dict(self.call).get("num_images_per_prompt", 1)

    @property
    def way(self) -> "Way":
        """How it is drawn, whatever the prompt."""
        return self.method, self.scheduler, self.weights, self.steps, self.call


Way = tuple[Method | None, str | None, Weights | None, int, tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class Drawn:
    """What drawing a cell gave.

    Fields:
        image: of a video its filmstrip (`h2cache.eval.generation.videos`).
        peak_memory_bytes: None off the GPU.
        trace: None where none of our methods was at work; `computed_fraction` is of its blocks.
        multiply_adds, calls: of the denoiser (`h2cache.eval.generation.work`).
        solver: the class of the scheduler.
        overhead_seconds: what the harness took of the time besides.
        cold_seconds: the denoising time of the same drawing just before, the first one with this method in its process;
            None where there was one before.
    """

    image: Image.Image
    text_seconds: float
    denoising_seconds: float
    vae_seconds: float
    peak_memory_bytes: int | None
    trace: pd.DataFrame | None
    computed_fraction: float
    multiply_adds: int
    calls: int
    solver: str
    machine: str
    versions: str
    overhead_seconds: float
    cold_seconds: float | None = None


@dataclass(frozen=True)
class Record:
    """A drawn cell, read back: where its files are, and what was measured. `image_sha256` is of the PNG's bytes.

    Records of the first versions lack `multiply_adds`, `calls`, `solver` and `cold_seconds`: None.
    """

    fingerprint: str
    image: Path
    trace: Path | None
    image_sha256: str
    text_seconds: float
    denoising_seconds: float
    vae_seconds: float
    peak_memory_bytes: int | None
    computed_fraction: float
    hit_rates: dict[str, float]
    machine: str
    versions: str
    multiply_adds: int | None = None
    calls: int | None = None
    solver: str | None = None
    cold_seconds: float | None = None

    @property
    def total_seconds(self) -> float:
        """What a user waits, the model being loaded."""
        return self.text_seconds + self.denoising_seconds + self.vae_seconds


class Store:
    """The records in `folder`, of images drawn with the model of `model` (`h2cache.eval.models.identity`).

    Attributes:
        damaged: fingerprints of records that `read` found cut short, damaged or contradicted by their files.
    """

    def __init__(self, folder: Path, model: Mapping[str, Any]):
        self.folder = folder
        self.damaged: set[str] = set()
        self._model = dict(model)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if need be, and keep other processes from writing to it. UserError if one does.

        The lock is the process's, so that not even SIGKILL leaves one behind. Half-written files of a process that was
        killed are removed.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}; change out=") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another run writes to {self.folder}: wait for it, or change out=") from error
            for leftover in self.folder.glob(".?*.*.*"):
                leftover.unlink()
            yield

    def fingerprint(self, cell: Cell) -> str:
        """Of all that the image depends on."""
        return _digest(json.dumps(self._identity(cell), sort_keys=True).encode())[:NAME_LENGTH]

    def read(self, cell: Cell) -> Record | None:
        """The cell's record, or None where there is none, or one that its files contradict.

        Files up to `HASHED` bytes are hashed; a larger one is if its size and time of change are not those that it was
        written with, and else only its end is looked at.
        """
        name = self.fingerprint(cell)
        try:
            stored = json.loads((self.folder / f"{name}.json").read_bytes())
            if stored["cell"] != self._identity(cell):
                raise ValueError("the record of another cell")
            for kind in ("png", "csv") if has_trace(cell) else ("png",):
                self._verify(self.folder / f"{name}.{kind}", stored["files"][kind])
            return self._record(cell, name, stored)
        except (OSError, ValueError, KeyError, TypeError):  # cut short, damaged or gone
            if (self.folder / f"{name}.json").exists():
                self.damaged.add(name)
            return None

    def write(self, cell: Cell, drawn: Drawn) -> Record:
        """Keep a drawn cell: whole, or not at all. UserError where there is no room."""
        name = self.fingerprint(cell)
        contents = {"png": _png(drawn.image)}
        if drawn.trace is not None:
            contents["csv"] = drawn.trace.to_csv(index=False).encode()
        with self._writing(), atomic_files([self.folder / f"{name}.{kind}" for kind in (*contents, "json")]) as paths:
            facts = {}
            for (kind, content), path in zip(contents.items(), paths[:-1], strict=True):
                path.write_bytes(content)
                status = path.stat()
                facts[kind] = {"sha256": _digest(content), "bytes": len(content), "mtime_ns": status.st_mtime_ns}
            record = {"cell": self._identity(cell), "files": facts, "measured": _measured(drawn)}
            paths[-1].write_text(json.dumps(record), encoding="utf-8")
        (self.folder / f"{name}.failed.json").unlink(missing_ok=True)
        return self._record(cell, name, record)

    def write_index(self, cells: Iterable[tuple[str, Cell]]) -> None:
        """Write `index.csv`: which files are of which setting, prompt and seed.

        Args:
            cells: those that there are records of, each with the name of its setting.
        """
        columns = ("file", "setting", "prompt_id", "seed", "steps", "prompt")
        rows = [(f"{self.fingerprint(c)}.png", name, c.prompt.id, c.seed, c.steps, c.prompt.text) for name, c in cells]
        with self._writing(), atomic_files([self.folder / "index.csv"]) as (path,):
            pd.DataFrame(rows, columns=columns).to_csv(path, index=False)

    def write_failure(self, cell: Cell, error: str) -> None:
        """Note why a cell could not be drawn; drawing it takes the note away."""
        target = self.folder / f"{self.fingerprint(cell)}.failed.json"
        with self._writing(), atomic_files([target]) as (path,):
            note = {"cell": self._identity(cell), "error": error}
            path.write_text(json.dumps(note), encoding="utf-8")

    def _identity(self, cell: Cell) -> dict[str, Any]:
        """All that the image depends on, as JSON gives it back; 1 and 1.0 are the same."""
        method = {"method": "none", "fields": {}} if cell.method is None else cell.method.identity()
        identity = {
            "format": FORMAT,
            "model": self._model,
            "prompt": cell.prompt.text,
            "seed": cell.seed,
            "steps": cell.steps,
            **method,
        }
        # What says nothing is left out, so that older records keep their names.
        identity |= {"scheduler": cell.scheduler} if cell.scheduler else {}
        identity |= {"weights": cell.weights.identity} if cell.weights else {}
        identity |= {"call": dict(cell.call)} if cell.call else {}
        identity |= {"picture": cell.prompt.picture.image_sha256} if cell.prompt.picture else {}
        return json.loads(json.dumps(identity), parse_float=_number)

    def _record(self, cell: Cell, name: str, stored: Mapping[str, Any]) -> Record:
        return Record(
            fingerprint=name,
            image=self.folder / f"{name}.png",
            trace=self.folder / f"{name}.csv" if has_trace(cell) else None,
            image_sha256=stored["files"]["png"]["sha256"],
            **stored["measured"],
        )

    @staticmethod
    def _verify(path: Path, facts: Mapping[str, Any]) -> None:
        """Raise ValueError unless the file holds what its record says."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size != facts["bytes"]:
                raise ValueError(f"{path} was cut short")
            if status.st_size <= HASHED or status.st_mtime_ns != facts["mtime_ns"]:
                if _digest(file.read()) != facts["sha256"]:
                    raise ValueError(f"{path} was changed")
                return
            end = ENDS[path.suffix]
            file.seek(-len(end), os.SEEK_END)
            if file.read() != end:
                raise ValueError(f"{path} is damaged")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (ENOSPC, EDQUOT)
            reason = "the disk is full: make room" if full else f"{error.strerror}: put that right"
            raise UserError(
                f"cannot write to {self.folder}, {reason} and run the same command again; what is drawn is kept"
            ) from error


def has_trace(cell: Cell) -> bool:
    """Whether one of our methods draws it."""
    return isinstance(cell.method, CacheConfig)


def hit_rates(trace: pd.DataFrame) -> dict[str, float]:
    """Of each stage, the fraction of decisions that let it be skipped (hit or forced)."""
    decisions = list(zip(trace["stage"], trace["decision"], strict=True))
    total = Counter(stage for stage, _ in decisions)
    skipped = Counter(stage for stage, decision in decisions if decision in ("hit", "forced"))
    return {stage: skipped[stage] / count for stage, count in total.items()}


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _measured(drawn: Drawn) -> dict[str, Any]:
    names = ("text_seconds", "denoising_seconds", "vae_seconds", "peak_memory_bytes", "computed_fraction")
    names += ("machine", "versions", "multiply_adds", "calls", "solver", "cold_seconds")
    measured = {name: getattr(drawn, name) for name in names}
    return measured | {"hit_rates": {} if drawn.trace is None else hit_rates(drawn.trace)}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # A third larger than by default, in a tenth of the time.
    image.save(buffer, "PNG", compress_level=1, pnginfo=notes_of(image))
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
