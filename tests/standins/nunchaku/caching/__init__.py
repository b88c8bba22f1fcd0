"""nunchaku's own caches. As there, importing them puts nothing on a model."""

from . import diffusers_adapters, fbcache, teacache, utils, utils_v2

__all__ = ["diffusers_adapters", "fbcache", "teacache", "utils", "utils_v2"]
