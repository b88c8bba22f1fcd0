"""Decisions of several processes that share the tokens of one model (diffusers' `enable_parallelism`).

Each rank sees its own tokens, and what is measured on them differs between ranks. A rank that skips where another one
computes misses a collective of the attention, and all wait for ever. So a decision is made on sums over all tokens:
every rank gets the sums of each of the others, and adds them in the same order, so that all have the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..adapters.block_call import plain


@dataclass(frozen=True)
class Ranks:
    """The processes that share the tokens of a transformer.

    Fields:
        group: of these processes alone.
        uneven: whether one may have more tokens than another (`ulysses_anything`, `ring_anything`).
    """

    group: "distributed.ProcessGroup"
    uneven: bool

    def gathered(self, values: Tensor) -> Tensor:
        """(ranks * n,): `values` (n,) of each rank in turn; one collective."""
        everywhere = values.new_empty(distributed.get_world_size(self.group) * values.numel())
        distributed.all_gather_into_tensor(everywhere, values, group=self.group)
        return everywhere

    def lengths(self, parts: Sequence[Tensor]) -> list[list[int]]:
        """The tokens that each rank has of each of the parts, of which `parts` (1, tokens, C) are this rank's.

        Where ranks may have unequal numbers, it takes a collective and a read from the device to know.
        """
        size, own = distributed.get_world_size(self.group), [part.shape[1] for part in parts]
        if not self.uneven:
            return [[tokens] * size for tokens in own]
        counts = self.gathered(torch.tensor(own, device=parts[0].device)).view(size, -1)
        return counts.T.tolist()

    def joined(self, parts: Sequence[Tensor], lengths: list[list[int]]) -> Tensor:
        """(1, tokens, C): the whole sequence, in which a part's tokens stand in the order of the ranks."""
        rank, start = distributed.get_rank(self.group), 0
        whole = parts[0].new_zeros(1, sum(map(sum, lengths)), parts[0].shape[2])
        for part, counts in zip(parts, lengths, strict=True):
            first = start + sum(counts[:rank])
            whole[:, first : first + part.shape[1]] = part
            start += sum(counts)
        distributed.all_reduce(whole, group=self.group)  # to zeros, so that nothing is rounded
        return whole


def ranks_of(transformer: nn.Module) -> Ranks | None:
    """Those that share the tokens of `transformer`; None where it has them all to itself."""
    parallel = getattr(transformer, "_parallel_config", None)
    config = getattr(parallel, "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    if config is None or mesh is None or mesh.size() == 1:
        return None
    return Ranks(mesh.get_group(), config.ulysses_anything or config.ring_anything)


def as_split(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as the module's own forward gets them: diffusers' hooks split tensors on their way in."""
    registry = vars(plain(module)).get("_diffusers_hook")
    for name, hook in registry.hooks.items() if registry is not None else ():
        if name.startswith("cp_input"):
            _, arguments = hook.pre_forward(module, **arguments)
    return arguments
