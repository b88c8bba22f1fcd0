"""H2-Cache: hierarchical, exact and readable caching for diffusion transformers (arXiv 2510.27171)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import clone

if TYPE_CHECKING:
    from .adapters import register_adapter
    from .config import CacheConfig
    from .h2 import H2CacheConfig
    from .handle import Handle, apply
    from .plans import AtLeast, Plan, PlanConfig, calibrate
    from .plans.scheduler import PlanScheduler
    from .policy.rules import Decision
    from .trace import Trace
    from .tuning import Psnr, Speedup, Trial, Tuned, Unreachable, WallSpeedup, tune

__version__ = "0.1.0"

__all__ = [
    "AtLeast",
    "CacheConfig",
    "Decision",
    "H2CacheConfig",
    "Handle",
    "Plan",
    "PlanConfig",
    "PlanScheduler",
    "Psnr",
    "Speedup",
    "Trace",
    "Trial",
    "Tuned",
    "Unreachable",
    "WallSpeedup",
    "apply",
    "calibrate",
    "register_adapter",
    "tune",
]

clone.find_beside()


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: a program's help and its refusals need no torch."""
    homes = {
        "adapters": ("register_adapter",),
        "config": ("CacheConfig",),
        "h2": ("H2CacheConfig",),
        "handle": ("Handle", "apply"),
        "plans": ("AtLeast", "Plan", "PlanConfig", "calibrate"),
        "plans.scheduler": ("PlanScheduler",),
        "policy.rules": ("Decision",),
        "trace": ("Trace",),
        "tuning": ("Psnr", "Speedup", "Trial", "Tuned", "Unreachable", "WallSpeedup", "tune"),
    }
    for home, names in homes.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
