"""H2-Cache: hierarchical, exact and readable caching for diffusion transformers (arXiv 2510.27171)."""

from .config import CacheConfig
from .decisions import Decision
from .h2 import H2CacheConfig
from .handle import Handle, apply
from .trace import Trace

__all__ = ["CacheConfig", "Decision", "H2CacheConfig", "Handle", "Trace", "apply"]
