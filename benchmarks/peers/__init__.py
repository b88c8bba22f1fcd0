"""Everything that `benchmarks.pareto` compares, as far as it is installed."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline

from . import diffusers_hooks, ours
from .contender import OURS, Contender

__all__ = ["OURS", "Contender", "assemble", "own_copy"]


def assemble(
    pipe: FluxPipeline, prompts: Sequence[str], call: dict[str, Any], coefficients: Sequence[float], plans: Path
) -> tuple[list[Contender], dict[str, str]]:
    """All contenders, and what is not among them, with the reason.

    `prompts` are for methods that need a measurement beforehand; they must not be those that are compared on.
    """
    contenders = list(ours.contenders(coefficients, plans, call["num_inference_steps"]))
    contenders += diffusers_hooks.contenders(own_copy(pipe), prompts, call)
    left_out = dict(diffusers_hooks.LEFT_OUT)
    try:
        from . import cache_dit_blocks
    except ImportError as error:
        left_out["cache-dit"] = f"not installed ({error}): pip install cache-dit"
    else:
        contenders += cache_dit_blocks.contenders(call["num_inference_steps"])
        left_out |= cache_dit_blocks.missing()
    if not any(contender.method == ours.PLAN for contender in contenders):
        left_out["plans"] = "none was calibrated for this number of steps"
    return contenders, left_out


def own_copy(pipe: FluxPipeline) -> FluxPipeline:
    """The same pipeline with a transformer and a class of its own, for a library that may leave something on either.

    cache-dit replaces `__call__` of the pipeline's class, and finds out by the class's name what to do with it.
    """
    kind = type(pipe.__class__.__name__, (pipe.__class__,), {})
    other = kind(**pipe.components | {"transformer": copy.deepcopy(pipe.transformer)})
    other.set_progress_bar_config(disable=True)
    return other
