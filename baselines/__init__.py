"""The methods that H2-Cache is compared with, one file each, on the same engine."""

from .block_cache import BlockCacheConfig

__all__ = ["BlockCacheConfig"]
