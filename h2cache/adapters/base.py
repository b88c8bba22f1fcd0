"""What an adapter tells the engine."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..stages import Stage
from ..streams import BlockCall

Lead = Callable[["Passage", Callable[..., Any], tuple, dict[str, Any]], Any]


class Denoising(NamedTuple):
    """What the engine reads off one call of a denoiser.

    hidden_states: image tokens (B, N, C). encoder_hidden_states: text tokens (B, M, C'). timestep: (B,) or (1,), in
    the unit of the call. img_ids: the position ids that live as long as the run. branch: the tensors that tell the
    conditional from the unconditional call.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    timestep: Tensor
    img_ids: Tensor
    branch: tuple[Tensor, ...]
    adds_between_blocks: bool  # ControlNet samples, which are no part of a stage's residual
    txt_ids: Tensor | None = None  # position ids of the text
    as_returned: Callable[[Tensor], Any] = lambda sample: (sample,)  # what the call returns for an output (B, N, C)


@dataclass(frozen=True)
class Passage:
    """One call of the model, as an adapter sees it that leads the call through the blocks (`Adapter.led`).

    undivided: one stage takes all blocks and nothing is added between them, so that only its first and last are needed.
    once: `once(key, sources, make)` is what `make()` returned when it was first called in this branch of the run, a
    tuple of tensors; it is made again where one of the tensors `sources` is another, or was written to.
    """

    denoising: Denoising
    undivided: bool
    once: Callable[[Hashable, Sequence[Tensor], Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class BlockModules:
    """The modules inside a block that make up what it adds to the streams.

    forecast: their outputs, before the gates, can be forecast (attention: one tensor or several; MLPs: one).
    silenced: these only feed a forecast module; while it is skipped they need not run.
    image_mlp, text_mlp: those of `forecast` that act on each token alone.
    """

    forecast: tuple[torch.nn.Module, ...]
    silenced: tuple[torch.nn.Module, ...] = ()
    image_mlp: torch.nn.Module | None = None
    text_mlp: torch.nn.Module | None = None


class Adapter(Protocol):
    """Knowledge of one transformer class. Every application of a cache makes one of its own."""

    supported: str  # the class, as messages name it
    timestep_scale: float  # from the unit of the call to 0..1000

    def supports(self, module: object) -> bool:
        """Whether this adapter knows `module`."""

    def check(self, stages: Sequence[Stage]) -> None:
        """ValueError, saying what to use instead, where this transformer cannot have a method's stages."""

    def groups(self, transformer: torch.nn.Module) -> dict[str, list[torch.nn.Module]]:
        """The block lists by name ("double", "single"), in the order of the network; the same ones at every call."""

    def led(self, transformer: torch.nn.Module) -> dict[torch.nn.Module, Lead]:
        """Modules that hide blocks, and what is done in place of their calls: `lead(passage, proceed, args, kwargs)`
        calls the blocks one by one, where `proceed(*args, **kwargs)` would run them unseen."""

    def unchanging(self, transformer: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """Modules that return the same at every step of a run: a function of the position ids and of the constants
        `theta` and `axes_dim` (`unchanging.py`)."""

    def block_call(self, block: torch.nn.Module) -> BlockCall:
        """How `block` is called."""

    def modules(self, block: torch.nn.Module) -> BlockModules:
        """What can be skipped inside `block`."""

    def denoising(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Denoising:
        """What a call of the model says about its run."""
