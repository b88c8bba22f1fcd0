"""Tiny random pipelines of the model families, and how a test runs them.

A family is a builder of a pipeline and of its call arguments. Prompts are random embeddings made from a seed, so that
no text encoder is needed. The weights are random but not dead: see `lively`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

Transformer = TypeVar("Transformer", bound=nn.Module)
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


@dataclass(frozen=True)
class Family:
    """A tiny pipeline of one model family.

    Fields:
        name: the pytest id.
        build: makes the pipeline: float32, eval mode, no progress bar, the same weights each time.
        inputs: (one seed per sample, guided) -> the arguments of the pipeline's call, without generator, number of
            steps and output type.
        guided_calls: calls of the transformer in each guided step: 2, 1 (a doubled batch), or 0 (no guidance).
        steps: how many steps `generate` takes.
        output: the attribute of the pipeline's output that holds the result.
        output_type: what the pipeline is asked for.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    inputs: Callable[[list[int], bool], dict[str, Any]]
    guided_calls: int
    steps: int = 6
    output: str = "images"
    output_type: str = "latent"


def generate(
    family: Family,
    pipe: DiffusionPipeline,
    seeds: Sequence[int] = (0,),
    guided: bool = False,
    steps: int | None = None,
    inputs: dict[str, Any] | None = None,
    **more: Any,
) -> Tensor:
    """The latents of one run, (B, ...). A sample's noise follows from its own seed, whatever the batch.

    Args:
        seeds: one per sample: of its prompt and of its noise.
        guided: with classifier-free guidance.
        steps: instead of the family's own number.
        inputs: the call's arguments, instead of those that the family makes from the seeds.
        more: further arguments of the pipeline's call.
    """
    seeds = list(seeds)
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    call: dict[str, Any] = {
        **(family.inputs(seeds, guided) if inputs is None else inputs),
        "generator": generators,
        "num_inference_steps": family.steps if steps is None else steps,
        "output_type": family.output_type,
        **more,
    }
    result = getattr(pipe(**call), family.output)
    return torch.stack(list(result)) if isinstance(result, list | tuple) else torch.as_tensor(result)


@cache
def family_pipe(name: str) -> DiffusionPipeline:
    """The pipeline of the family of that name, built once per process."""
    from . import FAMILIES

    return next(family for family in FAMILIES if family.name == name).build()


def random_embeddings(seeds: Sequence[int], *shape: int, salt: int = 0) -> Tensor:
    """(B, *shape): a normal tensor per seed, the same whatever the batch; another `salt` gives others."""
    generators = [torch.Generator().manual_seed(97 * salt + seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def valid_tokens(seeds: Sequence[int], tokens: int) -> Tensor:
    """(B, tokens) float: a mask of a prompt's tokens, of another length for each of three seeds in a row."""
    lengths = torch.tensor([tokens - seed % 3 for seed in seeds])
    return (torch.arange(tokens) < lengths[:, None]).float()


def quiet(pipe: Pipeline) -> Pipeline:
    """The pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lively(transformer: Transformer, seed: int = 0, longest: float = 1000.0) -> Transformer:
    """The transformer in eval mode, with weights that make each block count; the same seed gives the same weights.

    diffusers' own initialisation leaves the gates near zero, so that every block is almost the identity and any cache
    looks right. Here a linear or convolutional layer has outputs of order one (variance 1 / fan_in), and so have free
    parameters such as scale-shift tables. Of the timestep's sinusoids only those count that are slower than a run
    (their phase turns by less than 4): the first block's residual changes by 5 % to 80 % a step in a run of six, and
    thresholds have something to decide.

    Args:
        longest: the largest timestep that the sinusoids are made of.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1, generator=generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
        elif "Norm" not in type(module).__name__ or hasattr(module, "scale_shift_table"):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.5, generator=generator)
    for module in transformer.modules():
        first = _from_sinusoids(module)
        if first is not None:
            half = first.in_features // 2  # sines and cosines, both of these frequencies
            slow = 10000.0 ** (-torch.arange(half) / half) <= 4 / longest
            first.weight.data *= (half / slow.sum()) * slow.repeat(2)
    return transformer.eval()


def _from_sinusoids(module: nn.Module) -> nn.Linear | None:
    """The linear layer that takes a timestep's sinusoids, if `module` is an embedding of timesteps."""
    if type(module).__name__ == "TimestepEmbedding":
        return module.linear_1
    if type(module).__name__ == "TimestepEmbedder":  # Z-Image's own
        return module.mlp[0]
    return None
