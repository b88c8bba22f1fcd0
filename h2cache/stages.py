"""A method, as data: which runs of blocks can be skipped, what is watched, what decides, what stands in."""

from dataclasses import dataclass
from functools import cached_property

from .clusters import Clusters
from .decisions import Rule
from .forecasts import Forecast, WeightedHistory
from .probes import Probe


@dataclass(frozen=True)
class Stage:
    """A contiguous run of blocks that is skipped as a unit.

    `groups` are names of the adapter's block lists, in order. `probe` says what the rule measures, None for a rule that
    measures nothing. `parent` names an earlier stage whose skip forces this one.

    With `modules` the blocks always run, and what is skipped are the attention and MLP modules inside them, each with a
    forecast of its own output before its gate; only a rule that measures nothing can decide about that. `clusters`
    keeps the forecasts of their MLPs fresh.

    With `output` the stage is the whole call of the model, and what is forecast is what the call returns, by a
    `WeightedHistory`; this, too, is for rules that measure nothing, and the only stage of its method.
    """

    name: str
    groups: tuple[str, ...]
    rule: Rule
    forecast: Forecast | WeightedHistory
    probe: Probe | None = None
    parent: str | None = None
    modules: bool = False
    clusters: Clusters | None = None
    output: bool = False

    def __post_init__(self) -> None:
        if self.output and (self.modules or self.probe is not None or self.parent is not None):
            raise ValueError(f"stage {self.name!r}: only a rule that measures nothing decides about the model's output")
        if self.output is not isinstance(self.forecast, WeightedHistory):
            raise ValueError(f"stage {self.name!r}: a WeightedHistory forecasts the model's output, and only that")
        if self.modules and (self.probe is not None or self.parent is not None):
            raise ValueError(f"stage {self.name!r}: only a rule that measures nothing decides about modules")
        if self.clusters is not None and not self.modules:
            raise ValueError(f"stage {self.name!r}: clusters refresh the forecasts of modules: set modules=True")

    @cached_property
    def runs_first_block(self) -> bool:
        """Whether the first block runs at every step, because the probe needs what it returns."""
        return self.probe is not None and self.probe.after_first_block

    @cached_property
    def fits(self) -> bool:
        """Whether the forecast learns from what is computed (`FittedForecast`)."""
        return hasattr(self.forecast, "fitted")

    @cached_property
    def keeps_residuals(self) -> bool:
        """Whether what is remembered is what its blocks add to the streams."""
        return not (self.modules or self.output)

    def order_at(self, step: int) -> int:
        """The order of the differences that are taken at a computed step."""
        return self.forecast.order if step >= self.forecast.first_difference else 0

    @property
    def remembers(self) -> tuple:
        """All that shapes the memory: while it stays equal, a changed threshold may go on with what is remembered."""
        return self.name, self.groups, self.probe, self.forecast, self.modules, self.clusters, self.output
