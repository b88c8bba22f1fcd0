"""The methods that H2-Cache is compared with, one file each, on the same engine."""

from .block_cache import BlockCacheConfig
from .clusca import ClusCaConfig
from .hicache import HiCacheConfig
from .taylorseer import TaylorSeerConfig
from .teacache import TeaCacheConfig

__all__ = ["BlockCacheConfig", "ClusCaConfig", "HiCacheConfig", "TaylorSeerConfig", "TeaCacheConfig"]
