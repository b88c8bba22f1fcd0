"""Reads and checks what `configs/experiment/*.yaml` say."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from h2cache.eval.errors import NotInstalled, UserError
from h2cache.eval.experiments.experiment import Experiment, Match
from h2cache.eval.experiments.settings import Setting, settings_of
from h2cache.eval.experiments.targets import made

# What an experiment need not say itself.
OF_THE_PROTOCOL = ("seeds", "steps", "metrics", "converged_steps", "converged_scheduler")


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
            settings += settings_of(
                f"{name}, setting {family}", family, entry, method, labelled=fields["match"] is None
            )
        except NotInstalled as error:
            left_out[family] = str(error)
    return Experiment(
        name=name,
        title=str(fields["title"]),
        description=" ".join(str(fields["description"]).split()),
        prompts=made(f"{name}: prompts", fields["prompts"], "load"),
        limit=fields["limit"],
        seeds=fields["seeds"],
        seeds_per_prompt=fields["seeds_per_prompt"],
        steps=fields["steps"],
        converged_steps=fields["converged_steps"],
        converged_scheduler=fields["converged_scheduler"],
        metrics=tuple(dict.fromkeys(fields["metrics"] or ())),
        settings=tuple(settings),
        outputs=tuple(made(f"{name}: outputs", output, "make") for output in fields["outputs"] or ()),
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
