"""Where in an image a setting goes wrong: in its coarse structure or in its fine detail."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from h2cache.eval.errors import UserError
from h2cache.eval.report.figures.sheet import read_image
from h2cache.eval.report.results import BASELINE, KEY, Artifact, Results
from h2cache.eval.report.tables.quantities import MEANINGLESS
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.statistics import Summary, summarize


@dataclass(frozen=True)
class ErrorSpectrum:
    """The share of the error's energy in low spatial frequencies, against the baseline's image, for each setting.

    cut: in cycles a pixel; 1/16 is the period of one token of a Flux model. compared: two settings, whose shares are
    subtracted image by image.
    """

    compared: tuple[str, str]
    cut: float = 1 / 16
    name: str = "error_spectrum"
    title: str = "Error in low and in high frequencies"

    def __post_init__(self) -> None:
        if not 0 < self.cut < 0.5:
            raise UserError(f"ErrorSpectrum: cut={self.cut!r} is not allowed: it must be between 0 and 0.5")
        if len(self.compared) != 2:
            raise UserError(f"ErrorSpectrum: compared={self.compared!r} is not allowed: give two settings")

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None where the compared settings have no image that differs from the baseline's."""
        shares = self._shares(results)
        first, second = self.compared
        if not {first, second} <= set(shares):
            return None
        difference = summarize((shares[first] - shares[second]).dropna())
        if not difference.n:
            return None
        header = ("setting", "error below the cut", "95 % interval", "images")
        rows = [(name, *_texts(summarize(values))) for name, values in shares.items()]
        rows.append((f"{first} - {second}", *_texts(difference)))
        data = pd.DataFrame(
            {"setting": name, "prompt_id": prompt, "seed": seed, "low_share": share}
            for name, values in shares.items()
            for (prompt, seed), share in values.items()
        )
        notes = (
            self._sentence(difference),
            f"Share of the energy of the difference from the baseline's image, mean of the channels, at spatial "
            f"frequencies below {self.cut:g} cycles a pixel (2-D Fourier transform, mean level included).",
        )
        return Sheet(self.title, header, tuple(rows), notes).write(data, folder, self.name, results.name)

    def _shares(self, results: Results) -> dict[str, pd.Series]:
        """Setting to the share of each image that differs from the baseline's."""
        references = results.baseline["image"]
        shares = {}
        others = results.frame[results.frame["setting"] != BASELINE]
        for name, rows in others.groupby("setting", sort=False, observed=True):
            images = rows.set_index(KEY)["image"]
            images = images[images.index.isin(references.index)]
            values = [low_share(_error(image, references[key]), self.cut) for key, image in images.items()]
            shares[name] = pd.Series(values, images.index, dtype=np.float64).dropna()
        return shares

    def _sentence(self, difference: Summary) -> str:
        first, second = self.compared
        points = f"{100 * difference.mean:+.1f} points [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
        if not difference.low * difference.high > 0:
            verdict = "cannot be told apart by where their error lies"
        else:
            verdict = f"differ: the error of {first if difference.mean > 0 else second} is the coarser one"
        return f"{first} and {second} {verdict} ({points} of it below the cut, paired over {difference.n} images)."


def low_share(error: np.ndarray, cut: float) -> float:
    """Of the energy of `error`, (H, W, channels), the part below `cut` cycles a pixel; NaN where there is no error."""
    energy = np.square(np.abs(np.fft.fft2(error, axes=(0, 1)))).sum(axis=2)
    rows, columns = (np.fft.fftfreq(size) for size in energy.shape)
    low = np.hypot(rows[:, None], columns[None, :]) < cut
    return float(energy[low].sum() / energy.sum()) if energy.any() else np.nan


def _error(image: Path, reference: Path) -> np.ndarray:
    a, b = (np.asarray(read_image(path), dtype=np.float64) for path in (image, reference))
    return a - b


def _texts(summary: Summary) -> tuple[str, str, str]:
    if not summary.n:
        return MEANINGLESS, MEANINGLESS, "0"
    interval = MEANINGLESS if np.isnan(summary.low) else f"{100 * summary.low:.1f} to {100 * summary.high:.1f} %"
    return f"{100 * summary.mean:.1f} %", interval, str(summary.n)
