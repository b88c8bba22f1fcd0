"""How a block is called: which arguments carry its streams, what it returns, and which arguments are per sample.

A stream is a tensor that every block adds a residual to. The streams of a call are a tuple with the image (or video)
tokens first and, where the blocks have them, the text tokens second. What a block only reads, such as the text of a
cross-attention, is no stream.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Streams = tuple[Tensor, ...]  # each (B, tokens, D), hidden_states first
Rows: TypeAlias = Tensor | slice  # samples of a batch


def sample_row(streams: Streams, sample: int) -> Streams:
    """One sample of the batch, as views of shape (1, tokens, D)."""
    if streams[0].shape[0] == 1:
        return streams
    return tuple(stream[sample : sample + 1] for stream in streams)


def join_rows(rows: Sequence[Streams]) -> Streams:
    """The batch made of single samples; without a copy when there is only one."""
    return rows[0] if len(rows) == 1 else tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def plain(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself, also of one inside `torch.compile`."""
    return getattr(module, "_orig_mod", module)


def parameter_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of a module's forward arguments."""
    return tuple(inspect.signature(type(plain(module)).forward).parameters)[1:]


def arguments_by_name(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module's forward."""
    return dict(zip(parameter_names(module), args, strict=False)) | kwargs if args else kwargs


@dataclass(frozen=True)
class BlockInterface:
    """What one kind of block takes and returns.

    Fields:
        streams: names of the arguments that carry the streams, hidden_states first.
        returns: for each position of the returned tuple the index of the stream that stands there, None where nothing
            of use stands there; or None instead of a tuple where the block returns one tensor, the first stream.
            `(1, 0)` is a block that returns (encoder_hidden_states, hidden_states).
        per_sample: names of the other arguments that have a batch dimension, or hold tensors that have one. A tensor
            among them of a multiple of the batch is taken as that many batches, stacked.
        joined: the one tensor that the block takes is [text; image], joined along the tokens.
    """

    streams: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    returns: tuple[int | None, ...] | None = (1, 0)
    per_sample: tuple[str, ...] = ("temb",)
    joined: bool = False


ONE_STREAM = BlockInterface(streams=("hidden_states",), returns=None)


class BlockCall:
    """The calls of one block, read and answered by the facts of its interface."""

    def __init__(self, block: torch.nn.Module, interface: BlockInterface):
        self.block = plain(block)
        self.names = parameter_names(block)
        self.interface = interface
        self.returns_tuple = interface.returns is not None
        returns = interface.returns if interface.returns is not None else (0,)
        # The place of each stream in what the block returns. A last block may return fewer streams than it takes.
        self._places = tuple(returns.index(i) for i in range(len(interface.streams)) if i in returns)
        self._length = len(returns)
        # The argument that each position of the returned tuple holds when the block is skipped.
        self._passed = tuple(None if i is None else interface.streams[i] for i in returns)
        self._selected = (*interface.streams, *interface.per_sample)

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    @property
    def returns_all(self) -> bool:
        """Whether all streams that the block takes leave it."""
        return len(self._places) == len(self.interface.streams)

    def read(self, arguments: dict[str, Any], text_tokens: int) -> Streams:
        """The streams that go into the block."""
        streams = [arguments[name] for name in self.interface.streams]
        batch = streams[0].shape[0]
        # One text for all images, such as a lone negative prompt, comes as a batch of one and leaves the block as many.
        return tuple([stream if stream.shape[0] == batch else stream.expand(batch, -1, -1) for stream in streams])

    def returned(self, streams: Streams) -> Streams:
        """Those of the streams that the block returns."""
        return streams[: len(self._places)]

    def parse(self, output: Any, text_tokens: int) -> Streams:
        """The streams in what the block returned."""
        return tuple([output[place] for place in self._places]) if self.returns_tuple else (output,)

    def result(self, streams: Streams) -> Any:
        """What the block would have returned, had it made these streams."""
        if not self.returns_tuple:
            return streams[0]
        output: list[Tensor | None] = [None] * self._length
        for place, stream in zip(self._places, streams, strict=False):
            output[place] = stream
        return tuple(output)

    def unchanged(self, arguments: dict[str, Any]) -> Any:
        """What the block returns when it is skipped: its input."""
        if not self.returns_tuple:
            return arguments[self.interface.streams[0]]
        return tuple([None if name is None else arguments[name] for name in self._passed])

    def clone_if_aliased(self, streams: Streams) -> Streams:
        """The streams, safe from what the model may do in place to the block's output."""
        return streams

    def room(self, streams: Streams) -> Streams | None:
        """Where what stands in for the block's output `streams` is best written; None: anywhere."""
        return None

    def select(self, arguments: dict[str, Any], rows: Rows, batch: int) -> dict[str, Any]:
        """The arguments of a call with only the samples `rows`.

        Args:
            arguments: of a call, by name.
            rows: indices into the batch, (K,) int64; or a slice, which copies nothing.
            batch: the number of samples in the call.
        """
        # By name: a rotary table (tokens, head_dim) has no batch dimension, though its length could equal the batch.
        return {
            name: select_batches(value, rows, batch) if name in self._selected else value
            for name, value in arguments.items()
        }


class JoinedBlockCall(BlockCall):
    """A block on one tensor [text; image] of shape (B, M+N, D), seen as the two streams that it holds."""

    def read(self, arguments: dict[str, Any], text_tokens: int) -> Streams:
        return self.parse(arguments[self.interface.streams[0]], text_tokens)

    def returned(self, streams: Streams) -> Streams:
        return streams

    def parse(self, output: Tensor, text_tokens: int) -> Streams:
        return output[:, text_tokens:], output[:, :text_tokens]

    def result(self, streams: Streams) -> Tensor:
        return torch.cat([streams[1], streams[0]], dim=1)

    def clone_if_aliased(self, streams: Streams) -> Streams:
        # ControlNet samples are added to the image part of the one tensor, in place.
        return tuple(stream.clone() for stream in streams)


def select_batches(value: Any, rows: Rows, batch: int) -> Any:
    """`select_rows` of an argument; a tensor of several batches, stacked, keeps the rows of each."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] > batch and value.shape[0] % batch == 0:
        return value.unflatten(0, (-1, batch))[:, rows].flatten(0, 1)
    return select_rows(value, rows, batch)


def select_rows(value: Any, rows: Rows, batch: int) -> Any:
    """`value` with the batch rows `rows` of every tensor in it whose first dimension is the batch.

    Walks dicts, lists and tuples; anything else is handed on.
    """
    if isinstance(value, Tensor):
        if not value.ndim or value.shape[0] != batch:
            return value
        return value[rows] if isinstance(rows, slice) else value.index_select(0, rows)
    if isinstance(value, dict):
        return {name: select_rows(item, rows, batch) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(select_rows(item, rows, batch) for item in value)
    return value
