"""Where a forecast stops being one: its error over order, interval and sigma, in float32 and in bfloat16."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from h2cache.eval.generation.features import forecast_errors, recorded
from h2cache.eval.report.figures.output import Drawn, FigureOutput
from h2cache.eval.report.figures.style import PAGE
from h2cache.eval.report.results import Results
from h2cache.policy.forecasts import Forecast, Hermite, Taylor

DTYPES = {torch.float32: "solid", torch.bfloat16: "dotted"}
COLOURS = ("#e69f00", "#0072b2", "#cc79a7", "#009e73", "#d55e00")


@dataclass(frozen=True, kw_only=True)
class Stability(FigureOutput):
    """Error of forecasting what each block adds, on the first `count` prompts of the baseline: a panel an interval.

    Lines: Taylor and Hermite at each of `sigmas`, over `orders`; the median over blocks of the relative L2 error.
    Features, differences and forecasts are in float32 (solid) and in bfloat16 (dotted), the features being the same.
    """

    name: str = "stability"
    title: str = "Stability of the forecasts"
    count: int = 4
    orders: tuple[int, ...] = (1, 2, 3, 4, 5)
    intervals: tuple[int, ...] = (3, 5, 7)
    sigmas: tuple[float, ...] = (0.3, 0.5, 0.7)

    def draw(self, results: Results) -> Drawn | None:
        runs = results.baseline.reset_index().head(self.count)
        if runs.empty or results.model_config is None:
            return None
        prompts = [(results.prompt_of(run), int(run["seed"])) for _, run in runs.iterrows()]
        values = recorded(results.model_config, prompts, int(runs["steps"].iloc[0])).values
        errors = {
            (name, interval, dtype): [_median(values, basis, interval, dtype) for basis in bases]
            for name, bases in self._bases().items()
            for interval in self.intervals
            for dtype in DTYPES
        }
        figure = Figure(figsize=(PAGE, 2.5), layout="constrained")
        axes = figure.subplots(1, len(self.intervals), sharey=True, squeeze=False)[0]
        for ax, interval in zip(axes, self.intervals, strict=True):
            for colour, name in zip(COLOURS, self._bases(), strict=False):
                for dtype, line in DTYPES.items():
                    label = name if dtype is torch.float32 else None
                    ax.plot(
                        self.orders,
                        errors[name, interval, dtype],
                        linestyle=line,
                        color=colour,
                        marker=".",
                        label=label,
                    )
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.set_title(f"interval {interval}")
            ax.set_xlabel("order")
            ax.set_xticks(self.orders)
        axes[0].set_ylabel("relative error of a block")
        axes[0].legend(fontsize=7)
        return Drawn(figure, self._caption(errors, len(prompts)))

    def _bases(self) -> dict[str, list[Forecast]]:
        bases = {"Taylor": [Taylor(order) for order in self.orders]}
        return bases | {f"Hermite, σ = {s:g}": [Hermite(order, s) for order in self.orders] for s in self.sigmas}

    def _caption(self, errors: dict[tuple, list[float]], prompts: int) -> str:
        longest = self.intervals[-1]
        growth = {name: errors[name, longest, torch.float32] for name in self._bases()}
        grown = ", ".join(f"{each[-1] / each[0]:.1f} with {name}" for name, each in growth.items())
        rounding = {
            key: max(b / a for a, b in zip(errors[(*key[:2], torch.float32)], found, strict=True))
            for key, found in errors.items()
            if key[2] is torch.bfloat16
        }
        (name, interval, _), worst = max(rounding.items(), key=lambda item: item[1])
        return (
            f"From order {self.orders[0]} to {self.orders[-1]} at interval {longest}, the error of a forecast "
            f"grows by a factor of {grown}; bfloat16 makes it at most {worst:.2f} times that of float32 ({name}, "
            f"interval {interval}). Median over blocks of the relative L2 error of the residuals that stand for the "
            f"steps not computed, {prompts} prompt{'s' * (prompts != 1)}; solid: float32, dotted: the same features, "
            "differences and forecasts in bfloat16."
        )


def _median(values: torch.Tensor, basis: Forecast, interval: int, dtype: torch.dtype) -> float:
    return float(np.median(forecast_errors(values, basis, interval, dtype=dtype)))
