"""What the blocks of a model add at each step without a cache, and how well a basis would have forecast it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from h2cache.adapters import adapter_of
from h2cache.eval.generation.generate import generate
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.models.pipelines import ModelConfig, load_pipeline
from h2cache.policy.forecasts import Forecast, advance_terms, extrapolate

ENTRIES = 2**13  # of each block's residual, evenly spaced: of FLUX.1 whole residuals of one run are 50 GB


@dataclass(frozen=True)
class Features:
    """Residuals of the image stream.

    Fields:
        blocks: names, in the order in which they run, such as "structure 1".
        values: (steps, blocks, entries) float32; the entries are those of all prompts.
    """

    blocks: tuple[str, ...]
    values: Tensor


def recorded(model: ModelConfig, prompts: Sequence[tuple[Prompt, int]], steps: int) -> Features:
    """Of uncached runs on `prompts`, each with its seed. TypeError for a model whose blocks no adapter knows."""
    pipe = load_pipeline(model)
    adapter = adapter_of(pipe.transformer, pipe)
    blocks = {
        f"{role.value} {number}": (block, adapter.block_call(role, block))
        for role, of_role in adapter.blocks(pipe.transformer).items()
        for number, block in enumerate(of_role, 1)
    }
    runs: list[Tensor] = []
    for prompt, seed in prompts:
        added: dict[str, list[Tensor]] = {name: [] for name in blocks}

        def ran(name: str, block: nn.Module, args: tuple, kwargs: dict, output: object, added: dict = added) -> None:
            call = blocks[name][1]
            before, after = call.read(call.bind(args, kwargs), 0)[0], call.parse(output, 0)[0]
            residual = (after - before).flatten()
            added[name].append(residual[:: max(1, len(residual) // ENTRIES)][:ENTRIES].float().cpu())

        with ExitStack() as hooks:
            for name, (block, _) in blocks.items():
                hooks.enter_context(block.register_forward_hook(partial(ran, name), with_kwargs=True))
            arguments = model.arguments_with(prompt.picture and prompt.picture.image)
            generate(pipe, prompt.text, seed, **arguments | {"num_inference_steps": steps})
        runs.append(torch.stack([torch.stack(each) for each in added.values()], dim=1))
    return Features(tuple(blocks), torch.cat(runs, dim=2))


def forecast_errors(
    values: Tensor, forecast: Forecast, interval: int, first: int = 3, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(blocks,) relative L2 error of what stands for the steps that are not computed, in float64.

    Computed are the `first` steps and then one in `interval`, as TaylorSeer does it; features, differences and
    forecasts are of `dtype`, by the engine's own functions.
    """
    terms: list[Sequence[Tensor]] = []
    wrong = torch.zeros(values.shape[1], dtype=torch.float64)
    right = torch.zeros_like(wrong)
    last = 0
    for step, truth in enumerate(values):
        if step < first or step - last == interval:
            known = terms if step >= first - 1 else []  # differences are taken from the last of the first steps on
            terms = advance_terms(known, (truth.to(dtype),), step - last, forecast.order)
            last = step
            continue
        ahead = step - last
        (guess,) = extrapolate(terms, forecast.coefficients(ahead))
        wrong += (guess.double() - truth.double()).square().sum(dim=1)
        right += truth.double().square().sum(dim=1)
    return (wrong / right).sqrt()
