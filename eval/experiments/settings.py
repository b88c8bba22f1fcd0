"""What `configs/experiment/*.yaml` say, checked: which settings on which prompts, measured how, and shown as what."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from h2cache.eval.errors import NotInstalled, UserError, check_count
from h2cache.eval.generation.backends import Method
from h2cache.eval.generation.prompts import Prompt, PromptSet
from h2cache.eval.generation.records import Cell
from h2cache.eval.metrics.registry import BASELINE_IMAGE, CONVERGED_IMAGE, UNCACHED_IMAGE, kind
from h2cache.eval.models.schedulers import NAMES as SCHEDULERS
from h2cache.eval.models.weights import Weights
from h2cache.eval.report.results import BASELINE, Output, Tuning
from h2cache.tuning import Speedup, WallSpeedup

FIXED_SEED = 0  # the paper's, for every prompt
SEEDS = ("fixed", "per_prompt")
# What an experiment need not say itself.
OF_THE_PROTOCOL = ("seeds", "steps", "metrics", "converged_steps", "converged_scheduler")
OF_A_RUN = ("steps", "scheduler", "weights", "call")  # what a setting may say besides its method's fields
LABEL = "label"  # what it may say of itself: its name is then "Block Cache (library default)"
MATCHED = {"time": WallSpeedup, "blocks": Speedup}  # what can be the same for all settings of an experiment


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


@dataclass(frozen=True)
class Match:
    """Settings are tuned to the same speedup before they are drawn (`h2cache.eval.experiments.match`).

    Fields:
        speedup: against the baseline.
        prompts: the last so many of the set are for tuning, and not drawn.
        measured: "time" of whole pipeline calls, or "blocks" computed.
        apart: entries of the settings that are tuned to another speedup, by name.
    """

    speedup: float
    prompts: int
    measured: str = "time"
    apart: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.measured not in MATCHED:
            raise UserError(f"match: measured={self.measured!r} is not allowed: choose {' or '.join(MATCHED)}")
        check_count("match: prompts", self.prompts)
        try:
            for entry in (None, *self.apart):
                self.target(entry)
        except ValueError as error:
            raise UserError(f"match: {error}") from error

    def target(self, entry: str | None) -> Speedup:
        """Of an entry of the settings, for `h2cache.tune`."""
        return MATCHED[self.measured](self.apart.get(entry, self.speedup))


@dataclass(frozen=True)
class Row:
    """A setting on one prompt and seed: what is drawn, and what by name its metrics compare it with."""

    setting: Setting
    cell: Cell
    references: Mapping[str, Cell]


@dataclass(frozen=True)
class Experiment:
    """`settings` on the first `limit` prompts (None: all), `steps` denoising steps each (None: as many as the model).

    Fields:
        seeds: "fixed" (0 for every prompt) or "per_prompt" (0, 1, ... in the order of the set).
        seeds_per_prompt: images of each prompt; further ones are numbered on from the first ones of all prompts.
        converged_steps: for the solution that metrics `@converged` compare with.
        converged_scheduler: its scheduler, one of `h2cache.eval.models.schedulers.NAMES`; None: the pipeline's own.
        set_metrics: of a setting's images as a set, against the baseline's.
        left_out: settings that this machine lacks a library for, and what is missing.
        match: to what the settings are tuned; None: they are drawn as they are written.
    """

    name: str
    title: str
    description: str
    prompts: PromptSet
    limit: int | None
    seeds: str
    seeds_per_prompt: int
    steps: int | None
    converged_steps: int
    converged_scheduler: str | None
    metrics: tuple[str, ...]
    settings: tuple[Setting, ...]
    outputs: tuple[Output, ...]
    left_out: Mapping[str, str]
    match: Match | None = None
    set_metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seeds not in SEEDS:
            raise UserError(f"{self.name}: seeds={self.seeds!r} is not allowed: it must be {' or '.join(SEEDS)}")
        for field in ("limit", "steps"):
            check_count(f"{self.name}: {field}", getattr(self, field), optional=True)
        for field in ("seeds_per_prompt", "converged_steps"):
            check_count(f"{self.name}: {field}", getattr(self, field))
        if self.converged_scheduler not in (None, *SCHEDULERS):
            raise UserError(
                f"{self.name}: converged_scheduler={self.converged_scheduler!r} is not allowed: it must be null or one "
                f"of {', '.join(SCHEDULERS)}"
            )
        if not self.settings:
            raise UserError(
                f"{self.name}: there are no settings; name at least one, such as Baseline: {{method: none}}"
            )

    @property
    def converged_run(self) -> str:
        """What the converged solution is, in words."""
        return f"{self.converged_steps} steps" + (f" of {self.converged_scheduler}" if self.converged_scheduler else "")

    def rows(self, prompts: Sequence[Prompt], limit: int | None, steps: int) -> Iterator[Row]:
        """What is drawn, prompt by prompt, on `limit` prompts at most; `steps` where the experiment says nothing."""
        steps = self.steps or steps
        for index, prompt in enumerate(prompts[: len(prompts) - self._held_out(prompts)][:limit][: self.limit]):
            first = self._seed(index)
            apart = 1 if self.seeds == "fixed" else len(prompts)
            for seed in range(first, first + apart * self.seeds_per_prompt, apart):
                for setting in self.settings:
                    if not setting.is_drawn:
                        continue
                    run = {"scheduler": setting.scheduler, "weights": setting.weights, "call": setting.call}
                    cell = Cell(prompt, seed, setting.steps or steps, setting.config, **run)
                    yield Row(setting, cell, self._references(cell, steps))

    def tuning_prompts(self, prompts: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], int]:
        """Those that are for tuning alone, and the seed of the first; that of the next is one more."""
        count = len(prompts) - self._held_out(prompts)
        return tuple(prompts[count:]), self._seed(count)

    def _held_out(self, prompts: Sequence[Prompt]) -> int:
        count = self.match.prompts if self.match else 0
        if count >= len(prompts):
            raise UserError(f"{self.name}: match: prompts={count} leaves none of {len(prompts)} prompts to draw")
        return count

    def _seed(self, index: int) -> int:
        return FIXED_SEED if self.seeds == "fixed" else index

    def _references(self, cell: Cell, steps: int) -> dict[str, Cell]:
        """What the experiment's metrics compare the cell with; the baseline always, which its time is compared with."""
        wanted = {kind(name).reference for name in self.metrics}
        plain = replace(cell, method=None)
        known = {
            BASELINE_IMAGE: replace(plain, steps=steps, scheduler=None, weights=None),
            UNCACHED_IMAGE: plain,
            CONVERGED_IMAGE: replace(
                plain, steps=self.converged_steps, scheduler=self.converged_scheduler, weights=None
            ),
        }
        has_baseline = any(setting.name == BASELINE for setting in self.settings)
        return {
            name: reference
            for name, reference in known.items()
            # An uncached image is nothing to compare with itself; the baseline's time is always compared with.
            if (has_baseline and not cell.call if name == BASELINE_IMAGE else name in wanted and reference != cell)
        }


def read_experiments(cfg: DictConfig, method: Callable[[str], DictConfig]) -> tuple[Experiment, ...]:
    """The experiments of a composed configs/eval.yaml; `method` gives the configuration of a `configs/method` option.

    What an experiment leaves out is the protocol's: prompts, seeds, steps, metrics. UserError says what is wrong.
    """
    chosen = cfg.get("experiments")
    if not chosen:
        raise UserError("there is no experiment to do: choose some with experiment=[table1,frontier]")
    try:
        shared = {"description": "", "limit": None, "outputs": [], "seeds_per_prompt": 1, "match": None}
        shared["set_metrics"] = []
        shared |= {field: cfg.protocol[field] for field in OF_THE_PROTOCOL}
        shared["prompts"] = _plain(cfg.get("prompts") or cfg.protocol.prompts)
        written = {name: _plain(each) for name, each in chosen.items()}
    except OmegaConfBaseException as error:
        raise UserError(why_unresolved(error)) from error
    return tuple(_experiment(name, shared, fields, method) for name, fields in written.items())


def why_unresolved(error: OmegaConfBaseException) -> str:
    """What a configuration lacks, in a sentence."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: {error.full_key}=VALUE"
    return str(error).split("\n")[0]


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def _experiment(
    name: str, shared: Mapping[str, Any], written: Mapping[str, Any], method: Callable[[str], DictConfig]
) -> Experiment:
    fields = dict(shared) | dict(written)
    required = set(Experiment.__dataclass_fields__) - {"name", "left_out"}
    if set(fields) != required:
        wrong = ", ".join(sorted(set(fields) ^ required))
        raise UserError(f"{name}: unknown or missing: {wrong}; the fields are {', '.join(sorted(required))}")
    settings: list[Setting] = []
    left_out: dict[str, str] = {}
    for family, entry in (fields["settings"] or {}).items():
        try:
            settings += _settings(f"{name}, setting {family}", family, entry, method, labelled=fields["match"] is None)
        except NotInstalled as error:
            left_out[family] = str(error)
    return Experiment(
        name=name,
        title=str(fields["title"]),
        description=" ".join(str(fields["description"]).split()),
        prompts=_made(f"{name}: prompts", fields["prompts"]),
        limit=fields["limit"],
        seeds=fields["seeds"],
        seeds_per_prompt=fields["seeds_per_prompt"],
        steps=fields["steps"],
        converged_steps=fields["converged_steps"],
        converged_scheduler=fields["converged_scheduler"],
        metrics=tuple(dict.fromkeys(fields["metrics"] or ())),
        settings=tuple(settings),
        outputs=tuple(_made(f"{name}: outputs", output) for output in fields["outputs"] or ()),
        left_out=left_out,
        match=_match(name, fields["match"], fields["settings"] or ()),
        set_metrics=tuple(dict.fromkeys(fields["set_metrics"] or ())),
    )


def _match(name: str, written: Any, entries: Collection[str]) -> Match | None:
    if written is None:
        return None
    known = Match.__dataclass_fields__
    if not isinstance(written, Mapping) or not {"speedup", "prompts"} <= set(written) <= set(known):
        raise UserError(f"{name}: match={written!r} is not allowed: give speedup and prompts, of {', '.join(known)}")
    if unknown := [entry for entry in written.get("apart", ()) if entry not in entries]:
        raise UserError(f"{name}: match: apart names {unknown[0]!r}, which is no entry of the settings")
    try:
        return Match(**written)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


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


def _settings(
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
    made = {field: value for field, value in point.items() if field not in (*OF_A_RUN, LABEL)}
    return _Variant(point, _made(place, defaults | made), run)


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


def _made(place: str, config: Any) -> Any:
    """The object that a configuration with a `_target_` describes."""
    if not isinstance(config, Mapping) or "_target_" not in config:
        raise UserError(f"{place}: {config!r} is not allowed: it must be a mapping with a _target_")
    target = str(config["_target_"])
    try:
        get_object(target)
    except Exception as error:  # Hydra's ImportError, and whatever importing somebody's module raises
        raise UserError(f"{place}: there is no {target}{_beside(target)}") from error
    try:
        return instantiate(dict(config), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, NotInstalled):
            raise cause from error
        raise UserError(f"{place}: {str(cause).split(chr(10))[0]}") from error


def _beside(target: str) -> str:
    """What else the module of a `_target_` has, or where it may be meant, as the end of a sentence."""
    if target.split(".")[0] in ("baselines", "eval"):
        return f"; write h2cache.{target}"
    try:
        module = get_object(target.rpartition(".")[0])
    except Exception:  # as above
        return ": its module cannot be imported"
    return f"; choose from {', '.join(getattr(module, '__all__', ())) or 'what its module has'}"
