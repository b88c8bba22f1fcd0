"""Whether features change from step to step as a normal distribution would, and whether that is why Hermite helps."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from scipy import stats

from h2cache.eval.generation.features import Features, forecast_errors, recorded
from h2cache.eval.report.figures.output import Drawn, FigureOutput
from h2cache.eval.report.figures.style import BLACK, GREY, PAGE
from h2cache.eval.report.results import Results
from h2cache.policy.forecasts import Hermite, ScaledTaylor, Taylor

ORDERS = (1, 2, 3)
COLOURS = ("#0072b2", "#d55e00", "#009e73")
QUANTILES = 400
RESAMPLES, SEED = 2_000, 0
PLAIN = FuncFormatter(lambda value, place: f"{value:g}")


@dataclass(frozen=True, kw_only=True)
class Gaussianity(FigureOutput):
    """Finite differences of what each block adds, over the steps of the baseline on the first `count` prompts.

    Three panels: the excess kurtosis by block for each order (median over steps, and the middle 80 %); quantiles of a
    typical and of the least normal case against those of a normal distribution; and for each block the gain of Hermite
    over Taylor in forecasting it, at `interval`, `order` and `sigma`, against the departure from normal.
    """

    name: str = "gaussianity"
    title: str = "Are feature differences normal, and does it matter?"
    count: int = 4
    interval: int = 5
    order: int = 2
    sigma: float = 0.5

    def draw(self, results: Results) -> Drawn | None:
        runs = results.baseline.reset_index().head(self.count)
        if runs.empty or results.model_config is None:
            return None
        prompts = [(results.prompt_of(run), int(run["seed"])) for _, run in runs.iterrows()]
        features = recorded(results.model_config, prompts, int(runs["steps"].iloc[0]))
        kurtosis = {order: excess_kurtosis(features, order) for order in ORDERS}
        bases = {
            "Taylor": Taylor(self.order),
            "Hermite": Hermite(self.order, self.sigma),
            "Taylor scaled alike": ScaledTaylor(self.order, self.sigma),
            "reuse": Taylor(0),
        }
        values = features.values
        errors = {name: forecast_errors(values, basis, self.interval).numpy() for name, basis in bases.items()}
        gain = 100 * (1 - errors["Hermite"] / errors["Taylor"])
        departure = np.median(np.abs(np.concatenate([kurtosis[order] for order in ORDERS[: self.order]])), axis=0)
        figure = Figure(figsize=(PAGE, 2.5), layout="constrained")
        by_block, quantiles, gains = figure.subplots(1, 3)
        _by_block(by_block, kurtosis)
        cases = _quantiles(quantiles, features, kurtosis)
        gains.scatter(departure, gain, s=12, color=BLACK)
        gains.set_xscale("log")
        gains.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        gains.xaxis.set_major_formatter(PLAIN)
        gains.xaxis.set_minor_locator(NullLocator())
        gains.axhline(0, color=GREY, linewidth=0.6)
        gains.set_xlabel("median |excess kurtosis|")
        gains.set_ylabel("less error by Hermite, %")
        shown = (
            f"Residuals of the image stream on {len(prompts)} prompt{'s' * (len(prompts) != 1)}; quantiles of {cases}."
        )
        return Drawn(figure, f"{self._sentence(kurtosis, errors, gain, departure)} {shown}")

    def _sentence(
        self, kurtosis: dict[int, np.ndarray], errors: dict[str, np.ndarray], gain: np.ndarray, departure: np.ndarray
    ) -> str:
        rho, low, high = rank_correlation(departure, gain)
        if low > 0:
            verdict = "Blocks that are less normal gain more from Hermite"
        elif high < 0:
            verdict = "Blocks that are more normal gain more from Hermite"
        else:
            verdict = "How normal a block's differences are does not tell what Hermite gains there"
        medians = ", ".join(f"{np.median(values):.1f} at order {order}" for order, values in kurtosis.items())
        wrong = ", ".join(f"{name} {np.median(each):.3f}" for name, each in errors.items())
        return (
            f"{verdict}: rank correlation {rho:+.2f} [{low:+.2f}, {high:+.2f}] over {len(gain)} blocks (95 % interval, "
            f"{RESAMPLES} resamples of the blocks). The differences' median excess kurtosis is {medians}, where normal "
            f"is 0; the median relative error of a block's forecast at interval {self.interval}, order {self.order} "
            f"and sigma {self.sigma:g} is {wrong}."
        )


def excess_kurtosis(features: Features, order: int) -> np.ndarray:
    """(steps - order, blocks), over all entries of the differences of this order between steps in a row."""
    return stats.kurtosis(np.diff(features.values.double().numpy(), n=order, axis=0), axis=2)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Spearman's, with the 95 % interval of a percentile bootstrap over the pairs."""
    generator = np.random.default_rng(SEED)
    drawn = generator.integers(len(a), size=(RESAMPLES, len(a)))
    resampled = [stats.spearmanr(a[index], b[index]).statistic for index in drawn if len(set(index)) > 2]
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return float(stats.spearmanr(a, b).statistic), float(low), float(high)


def _by_block(ax: Axes, kurtosis: dict[int, np.ndarray]) -> None:
    for colour, (order, values) in zip(COLOURS, kurtosis.items(), strict=True):
        blocks = np.arange(1, values.shape[1] + 1)
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
        ax.fill_between(blocks, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(blocks, middle, color=colour, label=f"order {order}")
    ax.axhline(0, color=GREY, linewidth=0.6)
    ax.set_yscale("symlog", linthresh=1)
    ax.yaxis.set_major_formatter(PLAIN)
    ax.set_xlabel("block, in the order they run")
    ax.set_ylabel("excess kurtosis")
    ax.legend(fontsize=7)


def _quantiles(ax: Axes, features: Features, kurtosis: dict[int, np.ndarray]) -> str:
    """Draw the case in the middle and the last one by excess kurtosis at order 1; says which they are."""
    values = kurtosis[1]
    ranked = np.argsort(values, axis=None)
    expected = stats.norm.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES)
    named = []
    for label, place, colour in (("typical", ranked[len(ranked) // 2], BLACK), ("worst", ranked[-1], COLOURS[1])):
        step, block = np.unravel_index(place, values.shape)
        case = (features.values[step + 1, block] - features.values[step, block]).double().numpy()
        case = (case - case.mean()) / case.std()
        ax.plot(expected, np.quantile(case, (np.arange(QUANTILES) + 0.5) / QUANTILES), color=colour, label=label)
        named.append(f"the {label} case ({features.blocks[block]}, step {step + 1}, {values[step, block]:.1f})")
    ax.plot(expected, expected, color=GREY, linewidth=0.6, linestyle="dashed")
    ax.set_xlabel("normal quantile")
    ax.set_ylabel("quantile, in standard deviations")
    ax.legend(fontsize=7)
    return " and ".join(named)
