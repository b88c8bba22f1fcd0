"""The settings of an experiment: what an entry of its `settings` spells out, a row of a table each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from h2cache.eval.errors import NotInstalled, UserError, check_count
from h2cache.eval.experiments.targets import made
from h2cache.eval.generation.backends import Method
from h2cache.eval.models.schedulers import NAMES as SCHEDULERS
from h2cache.eval.models.weights import Weights
from h2cache.eval.report.results import BASELINE, Tuning

OF_A_RUN = ("steps", "scheduler", "weights", "call")  # what a setting may say besides its method's fields
LABEL = "label"  # what it may say of itself: its name is then "Block Cache (library default)"


@dataclass(frozen=True)
class Setting:
    """A row of a table.

    Fields:
        method: its family: one colour in every figure.
        config: the method with its fields; None without a cache.
        steps: denoising steps; None: the experiment's.
        scheduler: one of `h2cache.eval.models.schedulers.NAMES`; None: the pipeline's own.
        weights: what the model's are changed to; None: they are its own.
        call: arguments of the pipeline's call that are not the model's.
        tuning: how the setting was found, once it is.
    """

    name: str
    method: str
    config: Method | None
    steps: int | None = None
    scheduler: str | None = None
    weights: Weights | None = None
    call: tuple[tuple[str, Any], ...] = ()
    tuning: Tuning | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether there is a setting to draw: not where tuning found none that is fast enough."""
        return self.tuning is None or self.tuning.reached


def settings_of(
    place: str, family: str, entry: Any, method: Callable[[str], DictConfig], labelled: bool
) -> list[Setting]:
    """The settings of one entry: a method with fields, or a list of such; a field's list is an axis. None: no setting,
    for a method that a model cannot have. What is tuned is not `labelled`: it is not the setting as it is written."""
    if entry is None:
        return []
    variants: list[_Variant] = []
    for each in entry if isinstance(entry, list) else [entry]:
        if not isinstance(each, Mapping) or "method" not in each:
            raise UserError(f"{place}: {each!r} is not allowed: write a method with its fields, as {{method: h2cache}}")
        left_out = ("method",) if labelled else ("method", LABEL)
        fields = {field: value for field, value in each.items() if field not in left_out}
        variants += _variants(place, method(str(each["method"])), fields)
    if {variant.is_baseline for variant in variants} != {family == BASELINE}:
        raise UserError(
            f"{place}: {BASELINE} is the name of method none with the model's own scheduler, weights and steps, and of "
            "no other"
        )
    names = [variant.name(family, _differing(variants)) for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{place}: {name} is there more than once")
    return [Setting(name, family, variant.config, **variant.run) for name, variant in zip(names, variants, strict=True)]


@dataclass(frozen=True)
class _Variant:
    """One point that an entry's axes span: the fields as written, and what they make."""

    fields: Mapping[str, Any]
    config: Method | None
    run: Mapping[str, Any]  # OF_A_RUN, as far as they are written

    @property
    def is_baseline(self) -> bool:
        return self.config is None and not self.run

    def name(self, family: str, differing: Sequence[str]) -> str:
        label = f" ({self.fields[LABEL]})" if self.fields.get(LABEL) else ""
        varied = [f"{f} = {_text(self.fields[f])}" for f in differing if f in self.fields and f != LABEL]
        return ", ".join([family, *varied]) + label


def _variants(place: str, base: DictConfig, fields: Mapping[str, Any]) -> list[_Variant]:
    defaults = OmegaConf.to_container(base, resolve=True)
    known = [*(field for field in defaults if field != "_target_"), *OF_A_RUN, LABEL]
    for field in fields:
        if field not in known:
            raise UserError(f"{place}: there is no field {field}; choose from {', '.join(known)}")
    axes = [_axis(place, field, value, defaults.get(field)) for field, value in fields.items()]
    points = [dict(zip(fields, point, strict=True)) for point in product(*axes)]
    return [_variant(place, defaults, point) for point in points]


def _variant(place: str, defaults: Mapping[str, Any], point: Mapping[str, Any]) -> _Variant:
    run = {field: point[field] for field in OF_A_RUN if point.get(field) is not None}
    if "steps" in run:
        check_count(f"{place}: steps", run["steps"])
    if run.get("scheduler") not in (None, *SCHEDULERS):
        raise UserError(f"{place}: there is no scheduler {run['scheduler']}; choose from {', '.join(SCHEDULERS)}")
    if "weights" in run:
        run["weights"] = _weights(place, run["weights"])
    if "call" in run:
        run["call"] = tuple(sorted(run["call"].items()))
    fields = {field: value for field, value in point.items() if field not in (*OF_A_RUN, LABEL)}
    return _Variant(point, made(place, defaults | fields), run)


def _weights(place: str, written: Any) -> Weights:
    known = ", ".join(Weights.__dataclass_fields__)
    if not isinstance(written, Mapping) or not set(written) <= set(Weights.__dataclass_fields__):
        raise UserError(f"{place}: weights={written!r} is not allowed: give a mapping with {known}")
    try:
        return Weights(**written)
    except NotInstalled:
        raise
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _differing(variants: Sequence[_Variant]) -> list[str]:
    """The fields that tell the variants apart."""
    written = dict.fromkeys(field for variant in variants for field in variant.fields)
    return [field for field in written if len({repr(variant.fields.get(field)) for variant in variants}) > 1]


def _axis(place: str, field: str, value: Any, default: Any) -> list[Any]:
    """The values that a field takes. Where a field is a list itself, a list of lists is the axis."""
    is_axis = isinstance(value, list) and (not isinstance(default, list) or all(isinstance(v, list) for v in value))
    if is_axis and not value:
        raise UserError(f"{place}: {field} is an empty list; give at least one value")
    return value if is_axis else [value]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, str) and value.endswith((".json", ".safetensors")):
        return Path(value).stem
    return "none" if value is None else str(value)
