"""How much a run computed, counted where it is done, whoever calls or skips it: ours, diffusers' caches or cache-dit.

A linear or convolutional layer that runs costs its multiply-adds; an attention besides these the two products of its
queries, keys and values. A cache that answers for a block, an attention or an MLP never reaches the layers inside, and
one that skips attention alone still pays for its MLPs, which a count of attentions would not tell.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch import nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUSED = ("to_qkv", "to_added_qkv", "to_qkv_mlp_proj")  # one projection to queries, keys, values and, in FLUX.2, the MLP


class WorkCounter:
    """Counts inside its `with` block: `multiply_adds`, and `calls` of the pipeline's denoisers.

    A ControlNet's work counts, and its calls do not: it is part of each evaluation of the model.

    Enter before a cache is attached and leave after it is gone: caches that replace the `forward` of a layer then call
    the counted one where they compute, and none where they do not. (A forward hook would be called either way.) Layers
    of other kinds, such as quantized ones with kernels of their own, are not counted.
    """

    def __init__(self, pipe: DiffusionPipeline):
        self._denoisers = _modules(pipe, "transformer", "transformer_2", "unet")
        self._counted = [*self._denoisers, *_modules(pipe, "controlnet")]
        self._watched: list[tuple[nn.Module, Callable | None]] = []
        self._hooks: list[Any] = []
        self.multiply_adds = 0
        self.calls = 0

    def __enter__(self) -> Self:
        for denoiser in self._denoisers:
            self._hooks.append(denoiser.register_forward_pre_hook(self._called))
        for counted in self._counted:
            for module in counted.modules():
                if any(hasattr(module, name) for name in ("to_q", *FUSED)):
                    self._watch_attention(module)
                elif isinstance(module, LAYERS):
                    self._watch(module, self._adding(module))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for module, own in reversed(self._watched):
            if own is None:
                del module.forward
            else:
                module.forward = own
        for hook in self._hooks:
            hook.remove()
        self._watched, self._hooks = [], []

    def _called(self, denoiser: nn.Module, args: tuple) -> None:
        self.calls += 1

    def _adding(self, layer: nn.Module) -> Callable[[torch.Tensor], None]:
        """What adds the layer's multiply-adds; its size is looked up once, since a run calls it thousands of times."""
        weight = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()

        def ran(output: torch.Tensor) -> None:
            self.multiply_adds += output.numel() * weight

        return ran

    def _watch(self, module: nn.Module, ran: Callable[[Any], None]) -> None:
        """Call `ran(output)` each time that the module computes."""
        own, compute = vars(module).get("forward"), module.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = compute(*args, **kwargs)
            ran(output)
            return output

        module.forward = counted
        self._watched.append((module, own))

    def _watch_attention(self, attention: nn.Module) -> None:
        """Count q k^T and the weighted sum of v by the rows that its projections were applied to."""
        size = {"queries": 0, "keys": 0}  # values of the queries; keys a sample
        is_linear = isinstance(getattr(attention, "processor", None), SanaLinearAttnProcessor2_0)

        def queried(output: torch.Tensor) -> None:
            size["queries"] += output.numel()

        def keyed(output: torch.Tensor) -> None:
            size["keys"] += output.shape[1]

        def joined(output: torch.Tensor) -> None:
            size["queries"] += output.shape[:-1].numel() * attention.inner_dim
            size["keys"] += output.shape[1]

        def ended(output: Any) -> None:
            # Linear attention sums keys times values first: a head's width, and one to divide by, stand for the keys.
            keys = attention.inner_dim // attention.heads + 1 if is_linear else size["keys"]
            self.multiply_adds += 2 * size["queries"] * keys
            size.update(queries=0, keys=0)

        self._watch(attention, ended)
        projections = dict.fromkeys(("to_q", "add_q_proj"), queried) | dict.fromkeys(FUSED, joined)
        projections |= dict.fromkeys(("to_k", "add_k_proj", "to_kv", "to_added_kv"), keyed)
        for name, ran in projections.items():
            layer = getattr(attention, name, None)
            if isinstance(layer, nn.Module):
                self._watch(layer, ran)


def _modules(pipe: DiffusionPipeline, *names: str) -> list[nn.Module]:
    parts = [getattr(pipe, name, None) for name in names]
    return [part for part in parts if isinstance(part, nn.Module)]
