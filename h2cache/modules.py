"""Skipping inside blocks: each attention and MLP output computed or forecast on its own (TaylorSeer, arXiv 2503.06923).

The blocks run their own code; only the modules that cost something are answered for. A rule that measures nothing
decides for all samples alike, so that the features of a batch are kept together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import Call, Method, ModulePlace
from .clusters import ClusterMemory
from .forecasts import Features, advance_terms, extrapolate
from .graph import outside_graph
from .streams import Streams, plain
from .visit import Visit


def whereabouts(method: Method) -> list[tuple[dict[str, torch.nn.Module | None], str, torch.nn.Module]]:
    """The modules that a method skips inside its blocks: the block's children, the name there, the module."""
    children = [plain(block)._modules for block in method.places]
    return [(parts, name, part) for parts in children for name, part in parts.items() if part in method.modules]


def answer(call: Call, place: ModulePlace, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The module's output in this call: computed and remembered, or forecast."""
    visit = call.visits[place.stage.name]
    if visit.computed:
        output = proceed(*args, **kwargs)
        if not place.silenced:
            _remember(call, place, visit, output)
        return output
    given = args[0] if args else kwargs["hidden_states"]
    if place.silenced:
        return given[..., :0]
    return _forecast(call, place, visit, proceed, given)


@outside_graph
def _remember(call: Call, place: ModulePlace, visit: Visit, output: Tensor | tuple[Tensor, ...]) -> None:
    # Without its graph: what is forecast later has no gradient.
    outputs = tuple(part.detach() for part in ((output,) if isinstance(output, Tensor) else output))
    terms = call.context.modules.get(place.key, [])
    for sample in visit.computed if visit.stage.fits else ():
        visit.learn(sample, _rows(outputs, sample), [_rows(term, sample) for term in terms])
    step = call.context.step
    elapsed = step - visit.memories[0].computed_step
    call.context.modules[place.key] = advance_terms(terms, outputs, elapsed, visit.stage.order_at(step))


def _forecast(
    call: Call, place: ModulePlace, visit: Visit, proceed: Callable, given: Tensor
) -> Tensor | tuple[Tensor, ...]:
    terms = call.context.modules[place.key]
    if place.refreshed:
        call.context.clusters.refresh(terms[0][0], place.is_text, proceed, given)
    coefficients = [visit.coefficients(call.context.step, sample) for sample in range(len(visit.memories))]
    if all(row == coefficients[0] for row in coefficients):
        outputs = extrapolate(terms, coefficients[0])
    else:  # each sample has fitted its own
        rows = [extrapolate([_rows(term, i) for term in terms], row) for i, row in enumerate(coefficients)]
        outputs = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
    return outputs[0] if len(outputs) == 1 else outputs


def _rows(features: Features, sample: int) -> Features:
    return tuple(tensor[sample : sample + 1] for tensor in features)


@outside_graph
def regroup(call: Call, visit: Visit, streams: Streams) -> None:
    """Cluster the tokens of a computed step anew."""
    if call.context.clusters is None:
        call.context.clusters = ClusterMemory(visit.stage.clusters)
    call.context.clusters.regroup(streams)
