"""What configs/method has for a model, composed once a process: Hydra takes a twentieth of a second for each."""

from collections.abc import Sequence
from functools import cache

from hydra import compose
from omegaconf import DictConfig


def compose_once(config: str, overrides: Sequence[str]) -> DictConfig:
    """Hydra's `compose`, of what several tests ask for. What it returns is shared: do not change it."""
    return _composed(config, tuple(overrides))


def composed_method(model: str, option: str) -> DictConfig:
    return compose_once("run", [f"model={model}", f"method={option}"]).method


@cache
def _composed(config: str, overrides: tuple[str, ...]) -> DictConfig:
    return compose(config, overrides=list(overrides))
