"""Skipping inside blocks: each attention and MLP output computed or forecast on its own (TaylorSeer, arXiv 2503.06923).

The blocks run their own code; only the modules that cost something are answered for. A rule that measures nothing
decides for all samples alike, so that the features of a batch are kept together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapters.block_call import join_rows, sample_row
from ..policy.clusters import ClusterMemory
from ..policy.forecasts import advance_terms, extrapolate
from .autograd import outside_graph
from .decide import decide
from .layout import BlockSlot, Call, ModuleSlot
from .stage_step import StageStep


def run_block_of_modules(call: Call, slot: BlockSlot, arguments: dict[str, Any]) -> Any:
    """Run a block whose modules are skipped, uncompiled: compiled code would not stop at its modules."""
    if slot.index == 0:
        begin(call, slot, arguments)
    step = call.steps[slot.stage.name]
    output = slot.call.block._call_impl(**arguments)
    if step.computed:
        if slot.reclusters and slot.stage.clusters is not None:
            call.context.clusters = call.context.clusters or ClusterMemory(slot.stage.clusters)
            call.context.clusters.recluster(slot.call.parse(output, call.model_call.text_tokens))
        if slot.is_last:
            step.remember(step.stage_input, call.context.step, call.guard)
    return output


def begin(call: Call, slot: BlockSlot, arguments: dict[str, Any]) -> None:
    """Decide about all modules, before the first block runs."""
    streams = slot.call.read(arguments, call.model_call.text_tokens)
    if slot.stage.clusters is not None:
        if call.ranks is not None:
            raise RuntimeError(
                "ClusCa clusters all tokens of an image, and under enable_parallelism each process has only a part of "
                "them: use TaylorSeerConfig or HiCacheConfig, which are its forecasts without the clusters"
            )
        slot.stage.clusters.check(min(tokens.shape[1] for tokens in streams))
    decide(call, slot, arguments, streams, None)


def answer(module: torch.nn.Module, call: Call, original_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The module's output in this call: computed and remembered, or forecast."""
    slot = call.layout.modules.get(module)
    if slot is None:
        return original_forward(*args, **kwargs)
    step = call.steps[slot.stage.name]
    if step.computed:
        output = original_forward(*args, **kwargs)
        if slot.upstream_only:
            call.context.empty_outputs[slot.key] = without_channels(output)
        else:
            remember(call, slot, step, output)
        return output
    if slot.upstream_only:
        return call.context.empty_outputs[slot.key]
    return forecast(call, slot, step, original_forward, args[0] if args else kwargs["hidden_states"])


def without_channels(output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Tensors of the same tokens and no channels: what may stand for an output that nobody uses."""
    if isinstance(output, Tensor):
        return output.new_empty((*output.shape[:-1], 0))
    return tuple(without_channels(part) for part in output)


@outside_graph
def remember(call: Call, slot: ModuleSlot, step: StageStep, output: Tensor | tuple[Tensor, ...]) -> None:
    # Without its graph: what is forecast later has no gradient.
    outputs = tuple(part.detach() for part in ((output,) if isinstance(output, Tensor) else output))
    memory = call.context.modules[slot.key]
    call.guard.check([memory])
    outputs = call.guard.keep(outputs)
    for i in step.computed if step.stage.learns else ():
        step.learn(step.samples[i], sample_row(outputs, i), [sample_row(term, i) for term in memory.terms])
    elapsed = call.context.step - step.samples[0].memory.computed_step
    memory.terms = advance_terms(memory.terms, outputs, elapsed, step.stage.order_at(call.context.step))
    memory.seal()


def forecast(
    call: Call, slot: ModuleSlot, step: StageStep, original_forward: Callable, given: Tensor
) -> Tensor | tuple[Tensor, ...]:
    memory = call.context.modules[slot.key]
    terms = memory.terms
    if slot.refreshed:
        clusters = call.context.clusters
        assert clusters is not None  # nothing is forecast before a step is computed
        clusters.refresh(terms[0][0], slot.is_text, original_forward, given)
        memory.seal()
    coefficients = [sample.coefficients for sample in step.samples]
    if all(row == coefficients[0] for row in coefficients):
        outputs = extrapolate(terms, coefficients[0])
        if outputs is terms[0]:
            outputs = call.guard.keep(outputs)
    else:  # each sample has fitted its own
        outputs = join_rows(
            [extrapolate([sample_row(term, i) for term in terms], row) for i, row in enumerate(coefficients)]
        )
    return outputs[0] if len(outputs) == 1 else outputs
