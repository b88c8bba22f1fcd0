"""Runs that break off, and the modules at whose calls another thread can be met."""

from typing import Any

import pytest
from methods_under_test import runs_first_block, skips_modules
from pictures import picture
from torch import nn

from h2cache import CacheConfig


class Interruption(Exception):
    """What a user's callback or a broken block raises in the middle of a run."""


def break_off_between_steps(pipe: Any, error: type[BaseException]) -> BaseException:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            raise error("stop")
        return tensors

    with pytest.raises(error) as caught:
        picture(pipe, "a green label", seed=5, callback_on_step_end=stop)
    return caught.value


def called_at_every_step(config: CacheConfig, transformer: nn.Module) -> list[nn.Module]:
    """Parts of the model in the order of a call, once a call that runs it: before the blocks, among, behind them."""
    among = [transformer.transformer_blocks[0]] if runs_first_block(config) or skips_modules(config) else []
    return [transformer.x_embedder, *among, transformer.norm_out]
