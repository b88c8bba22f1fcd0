"""The object that a configuration with a `_target_` describes; a sentence for one that describes none."""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from h2cache.eval.errors import NotInstalled, UserError


def made(place: str, config: Any) -> Any:
    """The object that a configuration with a `_target_` describes."""
    if not isinstance(config, Mapping) or "_target_" not in config:
        raise UserError(f"{place}: {config!r} is not allowed: it must be a mapping with a _target_")
    target = str(config["_target_"])
    try:
        resolve_name(target)  # as Hydra finds it, without what Hydra logs
    except Exception as error:  # an ImportError, and whatever importing somebody's module raises
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
        module = resolve_name(target.rpartition(".")[0])
    except Exception:  # as above
        return ": its module cannot be imported"
    return f"; choose from {', '.join(getattr(module, '__all__', ())) or 'what its module has'}"
