"""The methods that H2-Cache is compared with, one file each, on the same engine."""

import sys

from h2cache.baselines.block_cache import BlockCacheConfig
from h2cache.baselines.clusca import ClusCaConfig
from h2cache.baselines.hicache import HiCacheConfig
from h2cache.baselines.taylorseer import TaylorSeerConfig
from h2cache.baselines.teacache import TeaCacheConfig

__all__ = ["BlockCacheConfig", "ClusCaConfig", "HiCacheConfig", "TaylorSeerConfig", "TeaCacheConfig"]

# In a clone, `import baselines` gives h2cache.baselines (h2cache/clone.py). Imported as that, this changes nothing.
sys.modules[__name__] = sys.modules["h2cache.baselines"]
