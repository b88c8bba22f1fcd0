"""Numbers about measured values: pure functions, float64, the same for the same values in any order."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES, SEED = 10_000, 0
AT_ONCE = 2_000_000  # drawn indices held in memory


@dataclass(frozen=True)
class Summary:
    """Of the finite values, `n` of them: all but `n` NaN without any, the interval NaN for fewer than two.

    low, high: the 95 % confidence interval of the mean over prompts (Student's t), several seeds of a prompt being one
    value: their mean. std: of the values. `infinite` values are counted, and are in none of
    the other numbers: an infinite PSNR says that two images are identical, and one would make every mean infinite.
    """

    n: int
    mean: float
    std: float
    median: float
    p95: float
    low: float
    high: float
    infinite: int = 0

    @property
    def count(self) -> int:
        """How many values were measured."""
        return self.n + self.infinite


def summarize(values: pd.Series) -> Summary:
    """Of values indexed by prompt and seed; NaN is a value that is not there."""
    array = values.to_numpy(np.float64)
    known = values[np.isfinite(array)].astype(np.float64)
    n, infinite = len(known), int(np.isinf(array).sum())
    if n == 0:
        return Summary(0, *[math.nan] * 6, infinite)
    finite, prompts = np.sort(known.to_numpy()), np.sort(_by_prompt(known).to_numpy())
    mean, count = float(finite.mean()), len(prompts)
    margin = math.nan
    if count > 1:
        margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * prompts.std(ddof=1) / math.sqrt(count))
    return Summary(
        n,
        mean,
        float(finite.std(ddof=1)) if n > 1 else math.nan,
        float(np.median(finite)),
        float(np.quantile(finite, 0.95)),
        mean - margin,
        mean + margin,
        infinite,
    )


def _by_prompt(values: pd.Series | pd.DataFrame) -> pd.Series | pd.DataFrame:
    """The mean over each prompt's seeds."""
    return values.groupby(level=0).mean() if values.index.nlevels > 1 else values


@dataclass(frozen=True)
class Ratio:
    """The mean of some values as a multiple of the baseline's, over the `n` prompts that have both.

    low, high: the 95 % interval over resampled prompts, values and baseline drawn together (percentile bootstrap,
    10,000 resamples of a fixed seed); NaN for fewer than two pairs. All NaN where the baseline's mean is not positive.
    """

    n: int
    value: float
    low: float
    high: float


def ratio(values: pd.Series, baseline: pd.Series) -> Ratio:
    """Both indexed by prompt and seed. Images that either lacks are left out; a prompt's seeds are drawn together."""
    pairs = pd.concat([values, baseline], axis=1, join="inner", keys=["value", "baseline"]).astype(np.float64)
    pairs = pairs[np.isfinite(pairs).all(axis=1)].sort_index()
    pairs = _by_prompt(pairs)
    n = len(pairs)
    above, below = pairs["value"].to_numpy(), pairs["baseline"].to_numpy()
    if n == 0 or below.mean() <= 0:
        return Ratio(n, math.nan, math.nan, math.nan)
    value = float(above.mean() / below.mean())
    if n == 1:
        return Ratio(n, value, math.nan, math.nan)
    generator = np.random.default_rng(SEED)
    drawn = []
    for start in range(0, RESAMPLES, step := max(1, AT_ONCE // n)):
        index = generator.integers(n, size=(min(step, RESAMPLES - start), n))
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn.append(above[index].mean(axis=1) / below[index].mean(axis=1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(n, value, float(low), float(high))


@dataclass(frozen=True)
class McNemar:
    """Whether something holds less often than before: `lost` where it held before alone, `gained` where now alone.

    p: of the exact two-sided test that both are equally likely; 1.0 where nothing changed.
    """

    lost: int
    gained: int
    p: float


def mcnemar(now: pd.Series, before: pd.Series) -> McNemar:
    """Both 1.0 or 0.0, indexed by prompt and seed; an image that either lacks, or has as NaN, is left out."""
    pairs = pd.concat([now, before], axis=1, join="inner", keys=["now", "before"]).dropna()
    lost = int((pairs["before"] > pairs["now"]).sum())
    gained = int((pairs["before"] < pairs["now"]).sum())
    p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return McNemar(lost, gained, p)
