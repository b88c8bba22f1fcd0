"""The record of every decision, and what it adds up to."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .policy.rules import Decision

if TYPE_CHECKING:
    import pandas

    from .runtime.run_state import Timestep

KEPT_RUNS = 1000


class Row(NamedTuple):
    """One decision: a stage of one sample in one call of the model.

    Fields:
        diff: the relL1 that was compared, None where none was measured.
        blocks_computed: of the stage's own blocks.
        sigma: the scale of the polynomial that stands in for the skipped stage; None where the stage is computed, and
            where the forecast has none.
    """

    run: int
    step: int
    timestep: "float | Timestep"
    context: str
    sample: int
    stage: str
    diff: float | None
    threshold: float
    decision: Decision
    blocks_computed: int
    sigma: float | None = None


@dataclass
class RunRecord:
    """The rows of one run, and how many blocks its stages and its model have."""

    stage_blocks: Mapping[str, int]
    total_blocks: int
    rows: list[Row] = field(default_factory=list)


class Trace:
    """Decisions of the last `KEPT_RUNS` runs, oldest first; older runs fall out, so that a service does not grow."""

    def __init__(self) -> None:
        self._stages: dict[str, None] = {}  # every stage that has been laid out, in order
        self._runs: dict[int, RunRecord] = {}
        self._begun = 0
        self._lock = threading.Lock()

    def expect(self, stages: Iterable[str]) -> None:
        """Let the summary name these stages, even before they have decided anything."""
        self._stages |= dict.fromkeys(stages)

    def begin_run(self, stage_blocks: Mapping[str, int], total_blocks: int) -> int:
        """The number of a new run, of a method with these stages on a model of so many blocks."""
        with self._lock:
            number, self._begun = self._begun, self._begun + 1
            self._runs[number] = RunRecord(stage_blocks, total_blocks)
            if len(self._runs) > KEPT_RUNS:
                del self._runs[next(iter(self._runs))]
        return number

    def rows_of(self, run: int) -> list[Row]:
        """The list that run number `run` appends to; of nobody's, where the run has fallen out."""
        record = self._runs.get(run)
        return [] if record is None else record.rows

    def __iter__(self) -> Iterator[Row]:
        """The rows, with their timesteps as numbers."""
        for row in self._rows():
            yield row._replace(timestep=float(row.timestep))

    def _rows(self) -> list[Row]:
        with self._lock:
            return [row for record in self._runs.values() for row in list(record.rows)]

    def __len__(self) -> int:
        return len(self._rows())

    def clear(self) -> None:
        """Forget all rows. Runs in progress go on with their next step."""
        with self._lock:
            for record in self._runs.values():
                record.rows = []

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per call x sample x stage, with the columns of `Row`."""
        import pandas

        rows = [row._asdict() | {"decision": str(row.decision)} for row in self]
        frame = pandas.DataFrame(rows, columns=Row._fields)
        return frame.astype({"diff": float, "threshold": float, "sigma": float})

    def summary(self) -> dict[str, Any]:
        """Totals over the trace.

        Returns:
            `runs`; `steps`, the calls of the model, summed over runs and contexts; `stages`, per stage the number of
            each decision; `computed_fraction` of all blocks, over samples; `max_speedup`, its inverse: the bound on the
            speedup if everything but the blocks were free (a double and a single block of Flux cost the same number of
            FLOPs a token). Where stages were forecast with a sigma, also `sigma`: per stage the smallest and the
            largest.
        """
        with self._lock:
            records = [replace(record, rows=list(record.rows)) for record in self._runs.values()]
        stages = {name: {str(decision): 0 for decision in Decision} for name in self._stages}
        sigmas: dict[str, tuple[float, float]] = {}
        runs = steps = total = skipped = 0
        for record in records:
            runs += bool(record.rows)
            steps += len({(row.context, row.step) for row in record.rows})
            total += len({(row.context, row.step, row.sample) for row in record.rows}) * record.total_blocks
            for row in record.rows:
                stages[row.stage][row.decision] += 1
                skipped += record.stage_blocks[row.stage] - row.blocks_computed
                if row.sigma is not None:
                    low, high = sigmas.get(row.stage, (row.sigma, row.sigma))
                    sigmas[row.stage] = min(low, row.sigma), max(high, row.sigma)
        fraction = 1 - skipped / total if total else 1.0
        totals = {
            "runs": runs,
            "steps": steps,
            "stages": stages,
            "computed_fraction": fraction,
            "max_speedup": 1 / fraction,
        }
        return totals | ({"sigma": sigmas} if sigmas else {})
