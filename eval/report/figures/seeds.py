"""What another seed changes beside what a cache changes, on one axis: a scale for decibels."""

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from h2cache.eval.errors import UserError
from h2cache.eval.metrics.images import psnr, ssim
from h2cache.eval.metrics.registry import kind
from h2cache.eval.report.figures.output import Drawn, FigureOutput
from h2cache.eval.report.figures.sheet import read_image
from h2cache.eval.report.figures.style import BLACK, GREY, LINE, PAGE, looks_of, wrap
from h2cache.eval.report.results import BASELINE, KEY, Results
from h2cache.eval.report.tables.statistics import summarize

BETWEEN = {"psnr": psnr, "ssim": ssim}  # two images, no weights
ATTRIBUTES = "attributes"
SEED = "another seed"
COLUMNS = ["setting", "prompt_id", "seed", "other_seed", "distance"]  # of the data: a pair of images in each row
SPREAD = (0.05, 0.95)  # quantiles that a bar spans
NAMES = 1.6  # inches for the names of settings
SCATTER = 0.22  # of a row, up and down, that dots are spread over


@dataclass(frozen=True, kw_only=True)
class SeedScale(FigureOutput):
    """A row of dots for every pair of the baseline's images of one prompt, and one for each setting's images against
    the baseline's of the same seed. Where attributes are measured, how far the share of right ones moves. The pairs
    are beside it as CSV.

    Fields:
        quality: psnr or ssim.
    """

    name: str = "seeds"
    title: str = "What a seed changes and what a cache changes"
    quality: str = "psnr"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quality not in BETWEEN:
            raise UserError(
                f"figure {self.name}: quality={self.quality!r} is not allowed: choose {' or '.join(BETWEEN)}"
            )

    def draw(self, results: Results) -> Drawn | None:
        if self.quality not in results.metrics or results.baseline.empty:
            return None
        rows = {SEED: self._of_seeds(results)}
        if rows[SEED].empty:
            return None
        others = results.frame[results.frame["setting"] != BASELINE]
        rows |= {
            name: self._of_cache(rows_of, results)
            for name, rows_of in others.groupby("setting", sort=False, observed=True)
        }
        rows = {name: changes for name, changes in rows.items() if len(changes)}
        shows_attributes = ATTRIBUTES in results.metrics and rows[SEED][ATTRIBUTES].notna().any()
        colours = {SEED: BLACK} | {
            name: looks_of(others["method"])[method].colour
            for name, method in zip(others["setting"], others["method"], strict=True)
        }
        panels = 2 if shows_attributes else 1
        lines = [wrap(name, NAMES) for name in rows]
        height = 0.6 + sum(max(0.27, LINE * len(each) + 0.06) for each in lines)
        figure = Figure(figsize=(PAGE, height), layout="constrained")
        axes = figure.subplots(1, panels, sharey=True, squeeze=False, width_ratios=[2.2, 1][:panels])[0]
        self._distances(axes[0], rows, colours)
        if shows_attributes:
            _attributes(axes[1], rows, colours)
        axes[0].set_yticks(range(len(rows)), ["\n".join(each) for each in lines])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        shown = pd.concat([changes.assign(setting=name) for name, changes in rows.items()])
        columns = [*COLUMNS, *([ATTRIBUTES] if shows_attributes else [])]
        data = shown[columns].rename(columns={"distance": self.quality, ATTRIBUTES: "attributes_change"})
        return Drawn(figure, self._caption(rows, shows_attributes), data)

    def _of_seeds(self, results: Results) -> pd.DataFrame:
        """A row for each two seeds of a prompt: `distance` of the baseline's images, `attributes`: how these differ."""
        found = []
        for prompt, rows in results.baseline.reset_index().groupby("prompt_id", sort=False):
            for a, b in combinations(rows.to_dict("records"), 2):
                distance = BETWEEN[self.quality](*(read_image(each["image"]).convert("RGB") for each in (a, b)))
                difference = abs(a.get(ATTRIBUTES, math.nan) - b.get(ATTRIBUTES, math.nan))
                pair = {"prompt_id": prompt, "seed": a["seed"], "other_seed": b["seed"]}
                found.append({**pair, "distance": distance, ATTRIBUTES: difference})
        return pd.DataFrame(found, columns=[*COLUMNS[1:], ATTRIBUTES])

    def _of_cache(self, rows: pd.DataFrame, results: Results) -> pd.DataFrame:
        """The same for each image of a setting and the baseline's of its prompt and seed."""
        pairs = rows.set_index(KEY)
        changed = pd.DataFrame({"distance": pairs[self.quality].astype(np.float64), ATTRIBUTES: math.nan})
        if ATTRIBUTES in results.metrics:
            changed[ATTRIBUTES] = (pairs[ATTRIBUTES] - results.baseline[ATTRIBUTES].reindex(pairs.index)).abs()
        changed = changed.dropna(subset=["distance"]).reset_index()
        return changed.assign(other_seed=changed["seed"])

    def _distances(self, ax: Axes, rows: dict[str, pd.DataFrame], colours: dict[str, str]) -> None:
        for place, (name, changes) in enumerate(rows.items()):
            values = np.sort(changes["distance"][np.isfinite(changes["distance"])])
            if not len(values):
                continue
            # Spread by rank in a fixed pattern, so that the same values make the same picture.
            offsets = SCATTER * (2 * ((np.arange(len(values)) * 0.618034) % 1) - 1)
            ax.plot(values, place + offsets, ".", color=colours[name], markersize=2.5, alpha=0.45, markeredgewidth=0)
            low, middle, high = np.quantile(values, [SPREAD[0], 0.5, SPREAD[1]])
            ax.plot([low, high], [place, place], color=colours[name], linewidth=1.2, solid_capstyle="butt")
            ax.plot([middle, middle], [place - 0.3, place + 0.3], color=colours[name], linewidth=1.8)
        seeds = rows[SEED]["distance"]
        ax.axvline(seeds[np.isfinite(seeds)].max(), color=GREY, linewidth=0.7, linestyle=(0, (4, 3)))
        ax.set_xlabel(f"{kind(self.quality).label}, between the two images")
        ax.grid(axis="x")

    def _caption(self, rows: dict[str, pd.DataFrame], shows_attributes: bool) -> str:
        unit = kind(self.quality).label.partition(", ")[2]
        form = ".1f" if unit else ".3f"

        def told(value: float) -> str:
            return f"{value:{form}}{f' {unit}' * bool(unit)}"

        seeds = rows[SEED]["distance"]
        farthest = min((each["distance"].min(), name) for name, each in rows.items() if name != SEED)
        pairs, prompts = len(seeds), rows[SEED]["prompt_id"].nunique()
        within = {name: int((each["distance"] <= seeds.max()).sum()) for name, each in rows.items() if name != SEED}
        overlap = [f"{count} of {len(rows[name])} with {name}" for name, count in within.items() if count]
        identical = sum(int(np.isinf(each["distance"]).sum()) for each in rows.values())
        caption = (
            f"Two seeds of a prompt give images at a median of {told(seeds.median())}, and the nearest two at "
            f"{told(seeds.max())} (dashed; {pairs} pairs of {prompts} prompts). Of the cached images, the one farthest "
            f"from its own uncached image is at {told(farthest[0])} ({farthest[1]}). "
        )
        caption += (
            f"At the dashed line or beyond: {', '.join(overlap)}. "
            if overlap
            else "None is as far from it as the nearest two seeds are from each other. "
        )
        caption += "A dot is a pair, the line its 5th to 95th percentile, the stroke the median."
        if identical:
            caption += f" {identical} pairs are identical and have no dot."
        if shows_attributes:
            caption += (
                " Right: mean absolute difference of the share of attributes that are right, with its 95 % interval "
                "over prompts."
            )
        return caption


def _attributes(ax: Axes, rows: dict[str, pd.DataFrame], colours: dict[str, str]) -> None:
    for place, (name, changes) in enumerate(rows.items()):
        # Pairs of a prompt are one value: they share images.
        summary = summarize(changes.groupby("prompt_id")[ATTRIBUTES].mean())
        if summary.n:
            ax.plot(summary.mean, place, "o", color=colours[name], clip_on=False)
            if not math.isnan(summary.low):
                ax.plot([max(0, summary.low), summary.high], [place, place], color=colours[name], linewidth=1.2)
    ax.set_xlim(left=0)
    ax.set_xlabel("attributes right: change")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(axis="x")
