"""What caching does to motion: when a cache hits, and whether flicker rises before PSNR falls."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from h2cache.eval.report.figures.gaussianity import PLAIN, rank_correlation
from h2cache.eval.report.figures.output import Drawn, FigureOutput
from h2cache.eval.report.figures.style import PAGE, looks_of
from h2cache.eval.report.results import BASELINE, Results

CLUSTERED = 1.5  # times the hits of another third of the steps


@dataclass(frozen=True, kw_only=True)
class Motion(FigureOutput):
    """Left: the share of videos in which a cache that measures hits, at each step. Right: flicker against PSNR."""

    name: str = "motion"
    title: str = "When caches hit, and what flickers"

    def draw(self, results: Results) -> Drawn | None:
        frame = results.frame
        if not {"flicker", "psnr_frames"} <= set(frame.columns):
            return None
        finite = np.isfinite(frame[["flicker", "psnr_frames"]].astype(float)).all(axis=1)
        videos = frame[(frame["setting"] != BASELINE) & finite]
        if len(videos) < 3:
            return None
        hits = hits_by_step(frame)
        looks = looks_of(frame["method"])
        figure = Figure(figsize=(PAGE, 2.9), layout="constrained")
        steps, scatter = figure.subplots(1, 2)
        for method, share in hits.items():
            steps.plot(np.arange(1, len(share) + 1), 100 * share, color=looks[method].colour)
        steps.set_xlabel("denoising step")
        steps.set_ylabel("videos with a hit, %")
        for method, rows in videos.groupby("method", sort=False):
            scatter.scatter(rows["psnr_frames"], rows["flicker"], s=8, color=looks[method].colour, label=method)
        figure.legend(fontsize=7, ncols=6, loc="outside upper center")
        scatter.set_yscale("log")
        scatter.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scatter.yaxis.set_minor_locator(NullLocator())
        scatter.yaxis.set_major_formatter(PLAIN)
        scatter.set_xlabel("PSNR per frame, dB")
        scatter.set_ylabel("flicker, levels")
        return Drawn(figure, " ".join([*_when(hits), _flickers(videos)]))


def hits_by_step(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Method to the share of its videos with a hit, at each step; of methods that measure before they decide."""
    found: dict[str, list[np.ndarray]] = {}
    for row in frame.itertuples():
        trace = None if row.trace is None or pd.isna(row.trace) else pd.read_csv(row.trace)
        if trace is None or trace["diff"].isna().all():
            continue
        found.setdefault(row.method, []).append((trace["decision"] == "hit").groupby(trace["step"]).any().to_numpy())
    return {
        method: np.mean([each for each in runs if len(each) == len(runs[0])], axis=0) for method, runs in found.items()
    }


def discordant(videos: pd.DataFrame) -> tuple[int, int]:
    """(pairs of one prompt's videos of which the one with more flicker has the higher PSNR, all pairs)."""
    pairs = [
        (a.flicker - b.flicker) * (a.psnr_frames - b.psnr_frames)
        for _, rows in videos.groupby("prompt_id")
        for a, b in combinations(rows.itertuples(), 2)
    ]
    return sum(product > 0 for product in pairs), len(pairs)


def _when(hits: dict[str, np.ndarray]) -> list[str]:
    """Whether hits cluster in time, by thirds of the steps."""
    said, clustered = [], []
    for method, share in hits.items():
        thirds = np.array([part.sum() for part in np.array_split(share, 3)])
        if thirds.sum():
            if thirds.max() > CLUSTERED * thirds.min():
                clustered.append(method)
            said.append(f"{method} {', '.join(f'{100 * each:.0f}' for each in thirds / thirds.sum())} %")
    verdict = f"Hits of {' and '.join(clustered)} cluster in time" if clustered else "Hits do not cluster in time"
    return [f"{verdict}: in the first, second and last third of the steps are {'; '.join(said)}."] if said else []


def _flickers(videos: pd.DataFrame) -> str:
    ranks = videos.groupby("prompt_id")[["flicker", "psnr_frames"]].rank(
        pct=True
    )  # prompts differ by more than methods
    rho, low, high = rank_correlation(ranks["flicker"].to_numpy(), ranks["psnr_frames"].to_numpy())
    wrong, pairs = discordant(videos)
    verdict = "Flicker rises as PSNR falls" if high < 0 else "PSNR does not tell which video flickers"
    alone = f"; of {pairs} pairs of videos of one prompt, {100 * wrong / pairs:.0f} % flicker more at a higher PSNR"
    return (
        f"{verdict}: their rank correlation within a prompt is {rho:+.2f} [{low:+.2f}, {high:+.2f}] (95 % interval, "
        f"{len(videos)} videos){alone if pairs else ''}."
    )
