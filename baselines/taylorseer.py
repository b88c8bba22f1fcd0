"""TaylorSeer (arXiv 2503.06923): on a fixed schedule, forecast features by their Taylor series."""

from dataclasses import dataclass

from h2cache.config import CacheConfig
from h2cache.policy.forecasts import Forecast, Taylor
from h2cache.policy.rules import Interval
from h2cache.policy.stages import NETWORK, BlockStage, ModuleStage, Stage


@dataclass(frozen=True)
class TaylorSeerConfig(CacheConfig):
    """Computes the first steps and then one in `interval`; between them forecasts, and measures nothing.

    Fields:
        interval: steps from one computed step to the next; 1 computes all.
        order: of the series; 0 reuses the last features.
        first_enhance: first steps of a run that always compute. Differences are taken from the last of them on.
        granularity: "module", as published: the output of every attention and MLP module, before its gate (single
            blocks: of both together), while norms and gates still run; or "stage": the residual that all structure
            blocks (Flux: double) add and the one that all detail blocks (Flux: single) add, while nothing runs.
        batch_decision: see `CacheConfig`; a schedule decides alike for all images.

    Memory per image and guidance branch, `order + 1` times, in the model's dtype, with N image and M text tokens of
    width D: at "stage" two residuals of (N, D) and (M, D), at "module" two of them for each double block and one for
    each single block. At FLUX.1-dev, 1024x1024, bfloat16 and order 1: 113 MB, and 4.3 GB. Compiled blocks run
    uncompiled at "module", since their modules are answered for one by one.
    """

    record_name = "baselines.taylorseer.TaylorSeerConfig"

    interval: int = 6
    order: int = 1
    first_enhance: int = 3
    granularity: str = "module"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer("interval", 1)
        self._integer("order", 0)
        self._integer("first_enhance", 1)
        self._one_of("granularity", ("module", "stage"))

    def _forecast(self) -> Forecast:
        return Taylor(self.order, first_difference=self.first_enhance - 1)

    def compose(self) -> tuple[Stage, ...]:
        rule, forecast = Interval(self.interval, self.first_enhance), self._forecast()
        if self.granularity == "module":
            return (ModuleStage("modules", NETWORK, rule, forecast),)
        return tuple(BlockStage(role, (role,), rule, forecast) for role in NETWORK)
