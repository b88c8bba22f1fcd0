"""Plans: which steps are computed, and which weights over earlier outputs stand in for the others, as a few KB of JSON.

A plan is made by `h2cache.calibrate`, or by a formula (`Plan.taylor` and others), and followed by
`h2cache.apply(pipe, PlanConfig(plan))`, which gives the pipeline a `PlanScheduler`. What is forecast is the output of
the whole model, so that a skipped step runs none of it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..config import CacheConfig
from ..policy.forecasts import Forecast, Hermite, Taylor
from .closed_form import adams_bashforth_weights, even_steps, forecast_weights
from .conditions import Conditions, OtherConditions
from .promise import Promise

if TYPE_CHECKING:
    from .handle import PlanHandle

FORMAT = 1
DIGITS = 6  # significant ones of a weight


@dataclass(frozen=True)
class Plan:
    """What a run of `steps` steps computes and forecasts.

    Fields:
        made_for: the conditions of the calibration; a run under others is refused unless it is allowed.
        computed: the steps that are computed, rising, the first one among them.
        weights: for every other step, those of the last computed outputs, newest first; they sum to one. A computed
            step may have some as well, its own output being the newest; without, it is taken with its output alone.
        notes: how it was made and what it reached; nothing depends on them.
    """

    made_for: Conditions
    computed: tuple[int, ...]
    weights: Mapping[int, tuple[float, ...]]
    notes: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        steps = self.made_for.steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"Plan.made_for.steps = {steps!r}: must be an integer >= 1")
        computed = tuple(self.computed)
        if not computed or computed[0] != 0 or list(computed) != sorted(set(computed)) or computed[-1] >= steps:
            raise ValueError(f"Plan.computed = {computed}: must be rising steps from 0, below {steps}")
        skipped = sorted(set(range(steps)) - set(computed))
        if set(skipped) - set(self.weights) or not set(self.weights) <= set(range(steps)):
            raise ValueError(
                f"Plan.weights is for steps {sorted(self.weights)}: must be for the others, {skipped}, and may be for "
                "computed ones"
            )
        rounded = {step: rounded_weights(self.weights[step]) for step in sorted(self.weights)}
        for step, weights in rounded.items():
            before = sum(earlier <= step for earlier in computed)
            sound = 1 <= len(weights) <= before and all(map(math.isfinite, weights))
            if not sound or abs(sum(weights) - 1) > 1e-3:
                raise ValueError(
                    f"Plan.weights[{step}] = {weights}: must be 1 to {before} finite numbers, as many outputs as were "
                    "computed before, that sum to one"
                )
        object.__setattr__(self, "computed", computed)
        object.__setattr__(self, "weights", rounded)

    def __hash__(self) -> int:
        return hash((self.made_for, self.computed, tuple(self.weights.items())))

    @classmethod
    def euler(cls, steps: int) -> Self:
        """Every step computed: Euler's method with so many steps."""
        return cls(Conditions(steps=steps), tuple(range(steps)), {})

    @classmethod
    def reuse(cls, steps: int, computed: int | Sequence[int]) -> Self:
        """The last output stands in for skipped ones.

        Args:
            steps: of a run.
            computed: how many of them are computed, evenly spread; or which.
        """
        return cls._forecast(steps, computed, Taylor(0))

    @classmethod
    def taylor(cls, steps: int, computed: int | Sequence[int], order: int = 1) -> Self:
        """TaylorSeer's forecast (arXiv 2503.06923), of the model's output; see `reuse`."""
        return cls._forecast(steps, computed, Taylor(order))

    @classmethod
    def hermite(cls, steps: int, computed: int | Sequence[int], order: int = 1, sigma: float = 0.5) -> Self:
        """HiCache's forecast (arXiv 2508.16984), of the model's output; see `reuse`."""
        return cls._forecast(steps, computed, Hermite(order, sigma))

    @classmethod
    def adams_bashforth(cls, steps: int, order: int = 2, sigmas: Sequence[float] | None = None) -> Self:
        """Every step computed, and taken with the last `order` outputs as if they were a polynomial.

        Args:
            steps: of a run.
            order: outputs that a step looks back on, its own among them; 1 is Euler's method.
            sigmas: the noise level at each step, as `pipe.scheduler.sigmas` has them; by default evenly spaced from 1
                to 0. The weights are right for these alone.

        Raises:
            ValueError: where `sigmas` are not so many, or do not fall.
        """
        levels = [1 - step / steps for step in range(steps)] if sigmas is None else [float(each) for each in sigmas]
        levels = [*levels[:steps], 0.0] if len(levels) in (steps, steps + 1) else levels
        if len(levels) != steps + 1 or any(later >= earlier for earlier, later in pairwise(levels)):
            raise ValueError(f"sigmas = {levels}: must be {steps} falling noise levels above 0")
        weights = adams_bashforth_weights(levels, order) if order > 1 else {}
        return cls(Conditions(steps=steps, sigmas=tuple(levels[:-1])), tuple(range(steps)), weights)

    @classmethod
    def _forecast(cls, steps: int, computed: int | Sequence[int], forecast: Forecast) -> Self:
        chosen = even_steps(steps, computed)
        return cls(Conditions(steps=steps), chosen, forecast_weights(steps, chosen, forecast))

    @property
    def steps(self) -> int:
        """Of a run."""
        steps = self.made_for.steps
        assert steps is not None  # a plan without them is refused
        return steps

    @property
    def history(self) -> int:
        """How many computed outputs a forecast looks back on, at most."""
        return max(map(len, self.weights.values()), default=1)

    @property
    def promise(self) -> Promise | None:
        """What was certified, under the conditions that it was made for."""
        return Promise.from_notes(self.notes.get("promise"))

    def promising(self, promise: Promise) -> "Plan":
        """The same plan with a promise."""
        return replace(self, notes={**self.notes, "promise": promise.to_notes()})

    def segment(self, index: int) -> range:
        """The computed step of that index, and the skipped ones after it."""
        end = self.computed[index + 1] if index + 1 < len(self.computed) else self.steps
        return range(self.computed[index], end)

    def strides(self, index: int, levels: Sequence[float], known: int) -> list[float]:
        """How far a computed step and the skipped ones after it go along each of the last outputs, newest first.

        Args:
            index: of the computed step.
            levels: noise levels, one more than steps.
            known: outputs that there are; weights of others fall on the newest.
        """
        strides: list[float] = []
        for step in self.segment(index):
            weights = normalized(self.weights.get(step, (1.0,))[:known])
            strides += [0.0] * (len(weights) - len(strides))
            for k, weight in enumerate(weights):
                strides[k] += (levels[step + 1] - levels[step]) * weight
        return strides

    def under(self, conditions: Conditions, allow_transfer: bool = False) -> "Plan":
        """The plan for a run under these conditions: itself, or resampled to the run's steps where that is allowed.

        Raises:
            OtherConditions: a ValueError, where the plan was made for others and `allow_transfer` is False.
        """
        if allow_transfer:
            return self if conditions.steps in (None, self.steps) else self.resampled(conditions.steps)
        differences = self.made_for.differences(conditions)
        if differences:
            raise OtherConditions(differences)
        return self

    def resampled(self, steps: int) -> "Plan":
        """The plan for another number of steps: computed steps and weights at the same parts of the run.

        Raises:
            ValueError: for what is no number of steps, and for a plan with weights at computed steps.
        """
        from .resample import resampled  # makes plans

        return resampled(self, steps)

    def to_json(self) -> str:
        """Text that `from_json` reads."""
        weights = ",\n".join(f'  "{step}": {json.dumps(list(values))}' for step, values in self.weights.items())
        parts = {
            "format": FORMAT,
            "made_for": {name: value for name, value in asdict(self.made_for).items() if value is not None},
            "computed": list(self.computed),
            "notes": dict(self.notes),
        }
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in parts.items()]
        lines.append(f'"weights": {{\n{weights}\n}}')
        return "{" + ",\n".join(lines) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """ValueError where `text` is no plan."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, where {FORMAT} is read")
            weights = {int(step): tuple(values) for step, values in data["weights"].items()}
            return cls(Conditions(**data["made_for"]), tuple(data["computed"]), weights, data["notes"])
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no plan of h2cache.calibrate: {error!r}") from error

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """ValueError naming the file where it holds no plan."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class PlanConfig(CacheConfig):
    """Follows a plan: computes its steps, and makes the others from weighted earlier outputs of the model.

    It is for pipelines, whose scheduler `apply` replaces by a `PlanScheduler` until it is removed. Nothing is measured,
    and nothing is read from the device.

    Fields:
        plan: from `h2cache.calibrate` or `Plan.load`; the path of its file will do.
        allow_transfer: run also where model, scheduler, guidance or resolution are not those of the calibration, with a
            plan resampled to the run's number of steps. Without it, ValueError names what differs. Guidance is asked of
            the pipeline that `apply` was given; the resolution is known from the noise levels, or after the first call
            of the model.
        batch_decision: see `CacheConfig`; a plan decides alike for all images.

    Image-to-image starts at the share of the computed steps that its strength asks for; what a ControlNet adds is part
    of the output, and forecast with it. Memory: see `PlanScheduler`.
    """

    record_name = "h2cache.plan.PlanConfig"

    plan: Plan
    allow_transfer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.plan, str | Path):
            try:
                object.__setattr__(self, "plan", Plan.load(self.plan))
            except OSError as error:
                self._refuse("plan", f"a Plan, or a file that can be read ({error.strerror})")
        if not isinstance(self.plan, Plan):
            self._refuse("plan", "a Plan, or the path of its JSON file")
        self._flag("allow_transfer")

    def identity(self) -> dict[str, Any]:
        """See `CacheConfig`. Noise levels that the plan does not know say nothing, as in records from before."""
        found = super().identity()
        if self.plan.made_for.sigmas is None:
            del found["fields"]["plan"]["made_for"]["sigmas"]
        return found

    def handle_for(self, target: object) -> "PlanHandle":
        from .handle import PlanHandle  # only here: diffusers' schedulers take long to import

        return PlanHandle(target, self)


def rounded_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """As they are written."""
    return tuple(float(f"{weight:.{DIGITS}g}") for weight in weights)


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """With what is missing to a sum of one added to the newest output's."""
    return (weights[0] + 1 - sum(weights), *weights[1:])
