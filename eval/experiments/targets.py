"""The object that a configuration with a `_target_` describes; a sentence for one that describes none."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from h2cache.eval.errors import NotInstalled, UserError


def made(place: str, config: Any) -> Any:
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
