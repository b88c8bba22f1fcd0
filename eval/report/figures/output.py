"""What all figures share: selection of settings and prompts, and the two files that each becomes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from h2cache.eval.errors import UserError
from h2cache.eval.files import atomic_files
from h2cache.eval.report.figures.style import DPI, styled
from h2cache.eval.report.results import Artifact, Results

# Without dates and versions in the files, the same results make the same bytes.
METADATA = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
DATA = ".csv"


@dataclass(frozen=True)
class Drawn:
    """A finished figure and what its caption says.

    Fields:
        data: the numbers that it shows, where they are not in the experiment's measurements.
    """

    figure: Figure
    caption: str
    data: pd.DataFrame | None = None


@dataclass(frozen=True, kw_only=True)
class FigureOutput(ABC):
    """A figure of an experiment: `name` is its file name, `title` its heading on the page. Lists become tuples."""

    name: str
    title: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if not self.name or Path(self.name).name != self.name:
            raise UserError(f"figure name={self.name!r} is not allowed: it must be a file name without a folder")

    @abstractmethod
    def draw(self, results: Results) -> Drawn | None:
        """The figure, drawn inside `styled()`; None where nothing of it was measured. UserError for unknown names."""

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """Write NAME.png (200 dpi), NAME.pdf and the figure's data, if it has any, as NAME.csv into `folder`.

        All of them or none. None as `draw`.
        """
        with styled():
            drawn = self.draw(results)
            if drawn is None:
                return None
            suffixes = [*METADATA] if drawn.data is None else [*METADATA, DATA]
            files = tuple(folder / f"{self.name}{suffix}" for suffix in suffixes)
            with atomic_files(files) as temporary:
                if drawn.data is not None:
                    drawn.data.to_csv(temporary[-1], index=False)
                for path in temporary[: len(METADATA)]:
                    FigureCanvasAgg(drawn.figure)
                    drawn.figure.savefig(path, dpi=DPI, metadata=METADATA[path.suffix])
        return Artifact(self.name, self.title, drawn.caption, files)

    def _require(self, holds: bool, field: str, allowed: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise UserError(f"figure {self.name}: {field}={value!r} is not allowed: it must be {allowed}")


def select(results: Results, column: str, wanted: Sequence[str], count: int | None = None) -> list[str]:
    """The `wanted` values of `column`, in that order; without any, the first `count` (None: all) in the frame's order.

    UserError names the first that the experiment does not have.
    """
    present = list(dict.fromkeys(results.frame[column]))
    missing = [value for value in wanted if value not in present]
    if missing:
        known = ", ".join(map(repr, present))
        raise UserError(f"{results.name} has no {column} {missing[0]!r} to draw; it has: {known}")
    return list(wanted) if wanted else present[:count]


def row_of(results: Results, setting: str, prompt_id: str) -> pd.Series | None:
    """The one row of a setting and a prompt; None where it is not there."""
    frame = results.frame
    rows = frame[(frame["setting"] == setting) & (frame["prompt_id"] == prompt_id)]
    return rows.iloc[0] if len(rows) else None
