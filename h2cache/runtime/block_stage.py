"""One block of a stage, in one call of the model: run for all samples, for some of them, or for none.

The order within a stage: the first block runs where the probe needs it -> compare and decide, per sample
(`decide.py`) -> the other blocks run, are skipped, or run for the samples that miss -> the last block's output ends the
stage: its residual is kept, or the forecast residual is added (`stage_step.py`). A skipped block returns its input, so
that whatever the model adds between blocks (ControlNet) arrives at the stage's last block.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..adapters.block_call import Streams
from .collectives import as_split
from .decide import decide
from .in_place import Watched
from .layout import BlockSlot, Call
from .modules import run_block_of_modules
from .stage_step import StageStep


def run_block(block: nn.Module, call: Call, original_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a call of `block` returns: unchanged where the method has nothing to do with it."""
    slot = call.layout.slots.get(block)
    if slot is None:
        return original_forward(*args, **kwargs)
    arguments = slot.call.bind(args, kwargs) if args else kwargs
    if not slot.stage.keeps_residuals:
        return run_block_of_modules(call, slot, arguments)
    # As the block's own code gets them: with this rank's tokens, where ranks share them.
    own = arguments if call.ranks is None else as_split(slot.call.block, arguments)
    if slot.index == 0:
        if slot.stage.runs_first_block:
            return run_first_block(call, slot, original_forward, arguments, own)
        before = call.guard.keep(slot.call.read(own, call.model_call.text_tokens))
        decide(call, slot, own, before, None)
    step = call.steps[slot.stage.name]
    if step.computed:
        # The first step sees whether a block in the middle writes in place; later ones need not look at its output.
        if call.context.step and not slot.is_last and step.rows is None and not call.model_call.adds_between_blocks:
            return original_forward(**arguments)
        output, end = compute(call, slot, step, original_forward, arguments, own)
        if not slot.is_last:
            return output
        step.remember(end, call.context.step, call.guard)
        if step.rows is None:
            return output
    elif slot.is_last:
        end = slot.call.returned(slot.call.read(own, call.model_call.text_tokens))
    else:
        return slot.call.unchanged(own)
    return slot.call.result(step.stand_in(end, into=slot.call.room(end)))


def run_first_block(
    call: Call, slot: BlockSlot, original_forward: Callable, arguments: dict[str, Any], own: dict[str, Any]
) -> Any:
    """Run the first block of a stage, and decide about the others by what it did."""
    before = Watched.of(call.guard.keep(slot.call.read(own, call.model_call.text_tokens)))
    output = original_forward(**arguments)
    after = slot.call.parse(output, call.model_call.text_tokens)
    spoiled = before.written_to(returned=after)
    if spoiled:  # what the block added can no longer be told: nothing is compared with it, now or later
        call.guard.found_in_place_writer(call.context.stage(slot.stage.name, before.tensors[0].shape[0]))
    if call.model_call.adds_between_blocks:
        after = slot.call.clone_if_aliased(after)
    step = decide(call, slot, own, before.tensors, call.guard.keep(after))
    if spoiled:
        call.guard.found_in_place_writer([sample.memory for sample in step.samples])
    if slot.is_last:
        step.remember(step.stage_input, call.context.step, call.guard)
    return output


def compute(
    call: Call, slot: BlockSlot, step: StageStep, original_forward: Callable, arguments: dict[str, Any], own: dict
) -> tuple[Any, Streams]:
    """Run the block for the samples that are computed.

    Returns:
        What the block returns for the whole batch, samples that are skipped unchanged; and the streams in it.
    """
    text_tokens, adds = call.model_call.text_tokens, call.model_call.adds_between_blocks
    if adds:
        step.note_additions(slot.call.read(own, text_tokens))
    if step.rows is None:
        output = original_forward(**arguments)
        end = slot.call.parse(output, text_tokens)
    else:
        streams = slot.call.read(own, text_tokens)
        chosen = slot.call.select(arguments, step.rows, streams[0].shape[0])
        computed = slot.call.parse(original_forward(**chosen), text_tokens)
        pairs = zip(slot.call.returned(streams), computed, strict=True)
        end = tuple([stream.index_copy(0, step.rows, rows) for stream, rows in pairs])
        output = slot.call.result(end)
    step.check(end)
    if adds:
        step.note_returned(call.guard.keep(slot.call.clone_if_aliased(end)))
    return output, end
