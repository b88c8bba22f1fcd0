"""How often a promised quality is kept: certified on some prompts, checked on others, over many random splits."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from h2cache import AtLeast
from h2cache.eval.report.results import BASELINE, KEY, Artifact, Results
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.statistics import SEED
from h2cache.plans.promise import certified


@dataclass(frozen=True)
class Promise:
    """For each of `levels`: over `splits` random splits of the images, how often the fastest setting that `certify` of
    them certify keeps the level on the others.

    Fields:
        metric: of the level; `fraction` and `confidence` of `h2cache.AtLeast`.
        outside: what the ids of prompts of another kind begin with. These are no part of a split: what the settings
            that were certified keep on them is shown beside, and is not promised.
    """

    levels: tuple[float, ...]
    certify: int = 80
    splits: int = 50
    fraction: float = 0.95
    confidence: float = 0.9
    metric: str = "psnr"
    outside: str = "unlike-"
    name: str = "promise"
    title: str = "A promised quality, and how often it is kept"

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None where too few images were made to certify anything and have some left."""
        frame = results.frame[results.frame["setting"] != BASELINE]
        scores = frame.pivot_table(self.metric, KEY, "setting", observed=True).dropna()
        work = frame.groupby("setting", observed=True)["evaluations"].mean().sort_values(ascending=False)
        foreign = scores.index.get_level_values("prompt_id").astype(str).str.startswith(self.outside)
        own, other = scores[~foreign][list(work.index)], scores[foreign][list(work.index)]
        if len(own) <= self.certify:
            return None
        full = results.baseline["evaluations"].mean()
        data = pd.DataFrame([self._row(level, own, other, full / work.to_numpy()) for level in self.levels])
        rows = tuple(self._texts(row) for row in data.to_dict("records"))
        notes = (
            f"Promised: with {self.confidence:.0%} confidence, at least {self.fraction:.0%} of the images are at the "
            f"level or above. {self.splits} random splits of {len(own)} images: {self.certify} certify, "
            f"{len(own) - self.certify} are fresh. Kept: among the fresh ones the fraction is no less, counted over "
            "the splits that promise anything.",
            "Speedup in evaluations of the fastest certified setting, mean over these splits. Settings, slowest first: "
            f"{', '.join(map(str, work.index))}.",
            f"Outside: {len(other)} prompts of another kind, for which nothing is promised.",
        )
        header = ("level", "splits that promise", "kept", "speedup", "fresh images at the level", "outside")
        return Sheet(self.title, header, rows, notes).write(data, folder, self.name, results.name)

    def _row(self, level: float, own: pd.DataFrame, other: pd.DataFrame, gains: np.ndarray) -> dict[str, float]:
        chance = random.Random(SEED)
        asked = AtLeast(psnr=level, fraction=self.fraction, confidence=self.confidence)
        found: list[tuple[float, float, float]] = []
        for _ in range(self.splits):
            order = chance.sample(range(len(own)), len(own))
            held, fresh = own.iloc[order[: self.certify]], own.iloc[order[self.certify :]]
            index = certified(asked, held.to_numpy().T.tolist())
            if index is not None:
                beyond = (other.iloc[:, index] >= level).mean() if len(other) else np.nan
                found.append((gains[index], (fresh.iloc[:, index] >= level).mean(), beyond))
        speedup, kept, beyond = np.mean(found, axis=0) if found else (np.nan,) * 3
        return {
            "level": level,
            "promised": len(found) / self.splits,
            "kept": np.mean([fresh >= self.fraction for _, fresh, _ in found]) if found else np.nan,
            "speedup": speedup,
            "fresh": kept,
            "outside": beyond,
        }

    def _texts(self, row: dict[str, float]) -> tuple[str, ...]:
        def percent(value: float) -> str:
            return "" if np.isnan(value) else f"{value:.1%}"

        speedup = "" if np.isnan(row["speedup"]) else f"{row['speedup']:.2f}x"
        return (
            f"{row['level']:g}",
            percent(row["promised"]),
            percent(row["kept"]),
            speedup,
            percent(row["fresh"]),
            percent(row["outside"]),
        )
