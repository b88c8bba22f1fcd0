"""The object that a configuration with a `_target_` describes; a sentence for one that describes none."""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from h2cache.eval.errors import NotInstalled, UserError


def made(place: str, config: Any, method: str | None = None) -> Any:
    """The object that a configuration with a `_target_` describes, as Hydra makes it of plain values.

    Not by Hydra's `instantiate`, with which the hundreds of settings of a study took most of the time to read it.

    Args:
        place: where the configuration is written, for a sentence about it.
        config: a mapping with a `_target_`.
        method: what the object must be able to do, such as "make"; None: it may be anything.
    """
    if not isinstance(config, Mapping) or "_target_" not in config:
        raise UserError(f"{place}: {config!r} is not allowed: it must be a mapping with a _target_")
    target = str(config["_target_"])
    try:
        kind = resolve_name(target)
    except Exception as error:  # an ImportError, and whatever importing somebody's module raises
        raise UserError(f"{place}: there is no {target}{_beside(target)}") from error
    fields = {name: _value(place, value) for name, value in config.items() if name != "_target_"}
    try:
        described = kind(**fields)
    except NotInstalled:
        raise
    except Exception as error:  # whatever a class, which may be anybody's, raises for what is written
        why = str(error).split("\n")[0] or f"{target} raises {type(error).__name__}"
        raise UserError(f"{place}: {why}") from error
    if method and not callable(getattr(described, method, None)):
        raise UserError(f"{place}: {target} is not allowed: it must be a class with a method {method}()")
    return described


def _value(place: str, value: Any) -> Any:
    """A field's value, with what it describes in its place."""
    if isinstance(value, Mapping):
        return (
            made(place, value) if "_target_" in value else {name: _value(place, each) for name, each in value.items()}
        )
    return [_value(place, each) for each in value] if isinstance(value, list) else value


def _beside(target: str) -> str:
    """What else the module of a `_target_` has, or where it may be meant, as the end of a sentence."""
    if target.split(".")[0] in ("baselines", "eval"):
        return f"; write h2cache.{target}"
    try:
        module = resolve_name(target.rpartition(".")[0])
    except Exception:  # as above
        return ": its module cannot be imported"
    return f"; choose from {', '.join(getattr(module, '__all__', ())) or 'what its module has'}"
