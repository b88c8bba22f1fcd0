"""IP-Adapter on V1."""

from . import diffusers_adapters, utils

__all__ = ["diffusers_adapters", "utils"]
