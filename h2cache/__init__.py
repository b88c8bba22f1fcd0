"""H2-Cache: hierarchical, exact and readable caching for diffusion transformers (arXiv 2510.27171)."""

from typing import TYPE_CHECKING, Any

from .adapters import register_adapter
from .config import CacheConfig
from .h2 import H2CacheConfig
from .handle import Handle, apply
from .plans import Plan, PlanConfig, calibrate
from .policy.rules import Decision
from .trace import Trace
from .tuning import Psnr, Speedup, Trial, Tuned, Unreachable, WallSpeedup, tune

if TYPE_CHECKING:
    from .plans.scheduler import PlanScheduler

__all__ = [
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


def __getattr__(name: str) -> Any:
    """`PlanScheduler`, imported when it is asked for: diffusers' schedulers bring PIL with them."""
    if name == "PlanScheduler":
        from .plans.scheduler import PlanScheduler

        return PlanScheduler
    raise AttributeError(f"module 'h2cache' has no attribute {name!r}")
