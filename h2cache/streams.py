"""What travels through the blocks, and how a block is called."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Streams(NamedTuple):
    """The two token streams of a joint transformer: image (B, N, D) and text (B, M, D)."""

    hidden_states: Tensor
    encoder_hidden_states: Tensor

    def row(self, sample: int) -> "Streams":
        """One sample of the batch, as views of shape (1, N, D) and (1, M, D)."""
        if self.hidden_states.size(0) == 1:
            return self
        return Streams(self.hidden_states[sample : sample + 1], self.encoder_hidden_states[sample : sample + 1])


def join_rows(rows: Sequence[Streams]) -> Streams:
    """The batch made of single samples; without a copy when there is only one."""
    return rows[0] if len(rows) == 1 else Streams(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


class BlockCall(Protocol):
    """The calling convention of a block, declared once by its adapter."""

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""

    def read(self, arguments: dict[str, Any], text_tokens: int) -> Streams:
        """The streams that go into the block."""

    def parse(self, output: Any, text_tokens: int) -> Streams:
        """The streams in what the block returned."""

    def result(self, streams: Streams) -> Any:
        """What the block would have returned, had it made these streams."""

    def untouched(self, arguments: dict[str, Any]) -> Any:
        """What the block returns when it is skipped: its input."""

    def modulated(self, arguments: dict[str, Any], sample: int) -> Tensor:
        """(1, N, D): one sample's image tokens as the first norm of a double block modulates them."""

    def kept(self, streams: Streams) -> Streams:
        """The streams, safe from what the model may do in place to the block's output."""

    def room(self, streams: Streams) -> Streams | None:
        """Where what stands in for the block's output `streams` had best be written; None: anywhere."""

    def select(self, arguments: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
        """The arguments of a call with only the samples `rows`."""


def plain(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself, also of one inside `torch.compile`."""
    return getattr(module, "_orig_mod", module)


def parameter_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of a module's forward arguments."""
    return tuple(inspect.signature(type(plain(module)).forward).parameters)[1:]


class _FluxCall:
    """What both conventions share: names for positional arguments, and which arguments are per sample."""

    per_sample = ("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs")

    def __init__(self, block: torch.nn.Module, onload: Callable[[torch.nn.Module], None]):
        self.names = parameter_names(block)
        self.block = plain(block)
        self.onload = onload

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.names, args, strict=False)) | kwargs

    def modulated(self, arguments: dict[str, Any], sample: int) -> Tensor:
        hidden_states, temb = arguments["hidden_states"], arguments["temb"]
        if hidden_states.size(0) > 1:
            hidden_states, temb = hidden_states[sample : sample + 1], temb[sample : sample + 1]
        self.onload(self.block)  # its norm may be offloaded with it, and it has not been called yet
        return self.block.norm1(hidden_states, emb=temb)[0]

    def room(self, streams: Streams) -> Streams | None:
        return None

    def select(self, arguments: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
        # By name: the rotary table (M+N, head_dim) has no batch dimension, though its length could equal the batch.
        return {
            name: select_rows(value, rows, batch) if name in self.per_sample else value
            for name, value in arguments.items()
        }


class JointCall(_FluxCall):
    """`block(hidden_states, encoder_hidden_states, ...) -> (encoder_hidden_states, hidden_states)`."""

    def read(self, arguments: dict[str, Any], text_tokens: int) -> Streams:
        image, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        # One text for all images, such as a lone negative prompt, comes as a batch of one and leaves the block as many.
        return Streams(image, text if text.size(0) == image.size(0) else text.expand(image.size(0), -1, -1))

    def parse(self, output: tuple[Tensor, Tensor], text_tokens: int) -> Streams:
        return Streams(output[1], output[0])

    def result(self, streams: Streams) -> tuple[Tensor, Tensor]:
        return streams.encoder_hidden_states, streams.hidden_states

    def untouched(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return arguments["encoder_hidden_states"], arguments["hidden_states"]

    def kept(self, streams: Streams) -> Streams:
        return streams


class ConcatenatedCall(_FluxCall):
    """`block(hidden_states, ...) -> hidden_states` on one tensor [text; image] of shape (B, M+N, D)."""

    def read(self, arguments: dict[str, Any], text_tokens: int) -> Streams:
        return self.parse(arguments["hidden_states"], text_tokens)

    def parse(self, output: Tensor, text_tokens: int) -> Streams:
        return Streams(output[:, text_tokens:], output[:, :text_tokens])

    def result(self, streams: Streams) -> Tensor:
        return torch.cat([streams.encoder_hidden_states, streams.hidden_states], dim=1)

    def untouched(self, arguments: dict[str, Any]) -> Tensor:
        return arguments["hidden_states"]

    def kept(self, streams: Streams) -> Streams:
        # ControlNet samples are added to the image part of the one tensor, in place.
        return Streams(streams.hidden_states.clone(), streams.encoder_hidden_states.clone())


def select_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """`value` with the batch rows `rows` of every tensor in it whose first dimension is the batch.

    Walks dicts, lists and tuples; anything else is handed on.
    """
    if isinstance(value, Tensor):
        return value.index_select(0, rows) if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: select_rows(item, rows, batch) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(select_rows(item, rows, batch) for item in value)
    return value
