"""The record of every decision, and what it adds up to."""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .decisions import Decision
from .memory import Moment

if TYPE_CHECKING:
    import pandas

KEPT_RUNS = 1000


class Row(NamedTuple):
    """One decision: a stage of one sample in one call of the denoiser.

    `diff` is the relL1 that was compared, None where none was measured. `blocks_computed` counts the stage's own
    blocks.
    """

    run: int
    step: int
    timestep: float | Moment
    context: str
    sample: int
    stage: str
    diff: float | None
    threshold: float
    decision: Decision
    blocks_computed: int


class Trace:
    """Decisions of the last `KEPT_RUNS` runs, oldest first; older runs fall out, so that a service does not grow."""

    def __init__(self) -> None:
        self.total_blocks = 0
        self.stage_blocks: dict[str, int] = {}
        self._runs: dict[int, list[Row]] = {}
        self._lock = threading.Lock()

    def rows_of(self, run: int) -> list[Row]:
        """The list that run number `run` appends to."""
        with self._lock:
            if run not in self._runs:
                self._runs[run] = []
                if len(self._runs) > KEPT_RUNS:
                    del self._runs[next(iter(self._runs))]
            return self._runs[run]

    def __iter__(self) -> Iterator[Row]:
        """The rows, with their timesteps as numbers."""
        for row in self._rows():
            yield row._replace(timestep=float(row.timestep))

    def _rows(self) -> list[Row]:
        with self._lock:
            return [row for rows in self._runs.values() for row in list(rows)]

    def __len__(self) -> int:
        return len(self._rows())

    def clear(self) -> None:
        with self._lock:
            self._runs.clear()

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per call x sample x stage, with the columns of `Row`."""
        import pandas

        frame = pandas.DataFrame([row._replace(decision=str(row.decision)) for row in self], columns=Row._fields)
        return frame.astype({"diff": float, "threshold": float})

    def summary(self) -> dict[str, Any]:
        """Totals over the trace.

        `runs`; `steps` (calls of the denoiser, summed over runs and contexts); `stages`: per stage the number of each
        decision; `computed_fraction` of all blocks, over samples; `max_speedup`, its inverse: the bound on the speedup
        if everything but the blocks were free (a double and a single block cost the same number of FLOPs a token).
        """
        rows = self._rows()
        stages = {name: {str(decision): 0 for decision in Decision} for name in self.stage_blocks}
        for row in rows:
            stages[row.stage][row.decision] += 1
        calls = {(row.run, row.context, row.step) for row in rows}
        images = {(row.run, row.context, row.step, row.sample) for row in rows}
        total = len(images) * self.total_blocks
        skipped = sum(self.stage_blocks[row.stage] - row.blocks_computed for row in rows)
        fraction = 1 - skipped / total if total else 1.0
        return {
            "runs": len({row.run for row in rows}),
            "steps": len(calls),
            "stages": stages,
            "computed_fraction": fraction,
            "max_speedup": 1 / fraction,
        }
