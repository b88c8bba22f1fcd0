"""Tiny random pipelines of the real diffusers classes, one or more a model family."""

from . import flux, image, video
from .base import Family, family_pipe, generate

__all__ = ["FAMILIES", "Family", "family_named", "family_pipe", "generate"]

FAMILIES: tuple[Family, ...] = (*flux.FAMILIES, *image.FAMILIES, *video.FAMILIES)


def family_named(name: str) -> Family:
    """The family of that name."""
    return next(family for family in FAMILIES if family.name == name)
