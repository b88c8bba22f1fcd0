"""Both stages of a Flux apart, without a copy of its forward.

The structure stage are the double-stream blocks, the detail stage the single-stream blocks. What a stage adds to what
goes into it is its residual: image tokens (B, N, D) and text tokens (B, M, D).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from h2cache.plans import Trajectories
from h2cache.plans.weights import combine


class Residual(NamedTuple):
    """What a stage adds to its input."""

    image: Tensor
    text: Tensor

    def flat(self) -> Tensor:
        return torch.cat([self.image.flatten(1), self.text.flatten(1)], dim=1)


def combined(weights: Sequence[float], history: Sequence[Residual]) -> Residual:
    """`sum_k weights[k] * history[k]`, of each stream."""
    return Residual(*(combine(weights, stream) for stream in zip(*history, strict=True)))


class Evaluation(NamedTuple):
    """What a call of the model returned, and the residuals in it, computed or given."""

    output: Tensor
    structure: Residual
    detail: Residual


def evaluate(
    runs: Trajectories, step: int, latents: Tensor, structure: Residual | None = None, detail: Residual | None = None
) -> Evaluation:
    """The model at `step` with these residuals instead of what its stages would add; None computes the stage.

    What lies around the blocks (embedders, the last norm and projection) runs always.
    """
    model = runs.model
    with ExitStack() as stack:
        first = stack.enter_context(stage(model.transformer_blocks, structure))
        second = stack.enter_context(stage(model.single_transformer_blocks, detail))
        output = runs.compute(step, latents)
    return Evaluation(output, structure or first.residual(), detail or second.residual())


@dataclass
class Watch:
    """The streams that went into a stage and came out, (image, text)."""

    before: tuple[Tensor, Tensor] | None = None
    after: tuple[Tensor, Tensor] | None = None

    def residual(self) -> Residual:
        return Residual(*(after - before for before, after in zip(self.before, self.after, strict=True)))


@contextmanager
def stage(blocks: Sequence[nn.Module], given: Residual | None) -> Iterator[Watch]:
    """Watch one call of the model. With a residual `given`, the blocks compute nothing and the last adds it."""
    watch = Watch()
    own = [block.__dict__.get("forward") for block in blocks]  # what a block may wear already
    try:
        for index, block in enumerate(blocks):
            _watch(block, given, watch, index == 0, index == len(blocks) - 1)
        yield watch
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def _watch(block: nn.Module, given: Residual | None, watch: Watch, first: bool, last: bool) -> None:
    compute = block.forward

    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        if first:
            watch.before = hidden_states, encoder_hidden_states
        if given is None:
            text, image = compute(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **others)
        else:
            image, text = hidden_states, encoder_hidden_states
            if last:
                image, text = image + given.image, text + given.text
        if last:
            watch.after = image, text
        return text, image

    block.forward = forward
