"""The blocks' work, counted where it is done: at their linear layers, whoever calls or skips them.

A linear layer that runs costs its multiply-adds; where it projects the queries of an attention, the two products of
that attention are added, and one attention counts as executed. A cache that answers for a block, an attention or an MLP
never reaches the layers inside, and one that skips attention alone still pays for its MLPs, which a count of attentions
would not tell.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from diffusers import FluxTransformer2DModel


class WorkCounter:
    """Counts inside its `with` block. `multiply_adds` and `attentions`, since the last `reset`.

    Enter before a cache is attached and leave after it is gone: caches that replace the `forward` of a layer then call
    the counted one where they compute, and none where they do not. (A forward hook would be called either way.)
    """

    def __init__(self, transformer: FluxTransformer2DModel):
        self.transformer = transformer
        self._watched: list[torch.nn.Linear] = []
        self.reset()

    def reset(self) -> None:
        self.multiply_adds = 0
        self.attentions = 0
        self._tokens = {"image": 0, "text": 0}

    def __enter__(self) -> Self:
        model = self.transformer
        self._watch(model.x_embedder, lambda tokens: self._tokens.update(image=tokens))
        self._watch(model.context_embedder, lambda tokens: self._tokens.update(text=tokens))
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            for name, module in block.named_modules():
                if isinstance(module, torch.nn.Linear):
                    self._count(module, name.rsplit(".", 1)[-1])
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for layer in self._watched:
            del layer.forward
        self._watched.clear()

    def _count(self, layer: torch.nn.Linear, role: str) -> None:
        cost = layer.in_features * layer.out_features
        attends = role in ("to_q", "add_q_proj")  # a double block projects its text queries apart
        executions = int(role == "to_q")

        def ran(tokens: int) -> None:
            self.multiply_adds += tokens * cost
            if attends:  # q k^T and the weighted sum of v, each over all tokens
                self.multiply_adds += 2 * tokens * sum(self._tokens.values()) * layer.out_features
            self.attentions += executions

        self._watch(layer, ran)

    def _watch(self, layer: torch.nn.Linear, ran: Callable[[int], object]) -> None:
        """Call `ran` with the number of rows that `layer` is applied to, each time that it computes."""
        compute = layer.forward

        def counted(rows: torch.Tensor) -> torch.Tensor:
            ran(rows.numel() // rows.shape[-1])
            return compute(rows)

        layer.forward = counted
        self._watched.append(layer)
