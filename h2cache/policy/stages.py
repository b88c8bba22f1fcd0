"""A method, as data: what can be skipped, what is watched, what decides, what stands in."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from .clusters import Clusters
from .forecasts import Forecast
from .probes import Probe
from .rules import Rule

STRUCTURE, DETAIL = "structure", "detail"  # the roles of blocks: the earlier ones and the later ones
NETWORK = (STRUCTURE, DETAIL)


@dataclass(frozen=True)
class Stage:
    """What is skipped as a unit.

    Fields:
        name: as the trace has it.
        roles: of the blocks that belong to the stage, in the order of the network.
        rule: decides whether it is skipped.
        forecast: what stands in for it.
    """

    name: str
    roles: tuple[str, ...]
    rule: Rule
    forecast: Forecast

    probe: ClassVar[Probe | None] = None  # what the rule measures
    parent: ClassVar[str | None] = None  # the name of an earlier stage whose skip forces this one
    clusters: ClassVar[Clusters | None] = None  # what keeps the forecasts of the MLPs fresh
    keeps_residuals: ClassVar[bool] = False  # what is remembered is what the blocks add to the streams

    @cached_property
    def runs_first_block(self) -> bool:
        """Whether the first block runs at every step, because the probe needs what it returns."""
        return self.probe is not None and self.probe.after_first_block

    @cached_property
    def learns(self) -> bool:
        """Whether the forecast learns from what is computed (`FittedForecast`)."""
        return hasattr(self.forecast, "fitted")

    def order_at(self, step: int) -> int:
        """The order of the differences that are taken at a computed step."""
        return self.forecast.order if step >= self.forecast.first_difference else 0

    @property
    def memory_layout(self) -> tuple[Any, ...]:
        """All that shapes the memory: while it stays equal, a changed threshold may go on with what is remembered."""
        return type(self), *(getattr(self, field.name) for field in fields(self) if field.name != "rule")


@dataclass(frozen=True)
class BlockStage(Stage):
    """A contiguous run of blocks: their residual is computed, or forecast in one.

    Fields beside `Stage`'s:
        probe: what the rule measures, None for a rule that measures nothing.
        parent: the name of an earlier stage whose skip forces this one, or None.
    """

    probe: Probe | None = None  # type: ignore[misc]  # a field here, and no other stage has one
    parent: str | None = None  # type: ignore[misc]

    keeps_residuals = True


@dataclass(frozen=True)
class ModuleStage(Stage):
    """The attention and MLP modules inside the blocks: each has a forecast of its own output, before its gate.

    The blocks themselves always run. Only a rule that measures nothing can decide about modules. `clusters` keeps the
    forecasts of the MLPs fresh.
    """

    clusters: Clusters | None = None  # type: ignore[misc]
