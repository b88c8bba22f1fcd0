"""H2-Cache: hierarchical, exact and readable caching for diffusion transformers (arXiv 2510.27171)."""

from .calibration import calibrate
from .config import CacheConfig
from .decisions import Decision
from .h2 import H2CacheConfig
from .handle import Handle, apply
from .plan import Plan, PlanConfig
from .trace import Trace
from .tune import Psnr, Speedup, Trial, Tuned, Unreachable, tune

__all__ = [
    "CacheConfig",
    "Decision",
    "H2CacheConfig",
    "Handle",
    "Plan",
    "PlanConfig",
    "Psnr",
    "Speedup",
    "Trace",
    "Trial",
    "Tuned",
    "Unreachable",
    "apply",
    "calibrate",
    "tune",
]
