"""A denoising loop without a pipeline, and counters that see what a model really does."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor


def denoise(transformer: FluxTransformer2DModel, **options: Any) -> Tensor:
    """Final latents (batch, height * width, channels) of a run; the options are those of `denoising`."""
    *_, latents = denoising(transformer, **options)
    return latents


def denoising(
    transformer: FluxTransformer2DModel,
    *,
    steps: int = 8,
    batch: int = 1,
    seed: int = 0,
    height: int = 4,
    width: int = 4,
    text_tokens: int = 6,
    img_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    guidance: float = 3.5,
    before_step: Callable[[int, dict[str, Any]], None] | None = None,
    **model_arguments: Any,
) -> Iterator[Tensor]:
    """The latents after each of `steps` Euler steps of flow matching from t = 1 to t = 0.

    Image k is seeded with `seed + k`, noise and prompt alike, so that image k of a batch is the image of
    `denoise(..., seed=seed + k)`. Position ids are made once a run, as every diffusers pipeline does, or given as
    `img_ids`. `before_step(step, call)` may look at the arguments of a call and change them, or raise.
    """
    config, device = transformer.config, transformer.device
    generators = [torch.Generator().manual_seed(seed + image) for image in range(batch)]

    def draw(*shape: int) -> Tensor:
        return torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators]).to(device, dtype)

    latents = draw(height * width, config.in_channels)
    prompt, pooled = draw(text_tokens, config.joint_attention_dim), draw(config.pooled_projection_dim)
    img_ids = position_ids(height, width).to(device) if img_ids is None else img_ids
    txt_ids = torch.zeros(text_tokens, 3, device=device)
    times = torch.linspace(1, 0, steps + 1).to(device, dtype)
    for step in range(steps):
        call = dict(
            hidden_states=latents,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=times[step].expand(batch),
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=torch.full((batch,), guidance, device=device, dtype=dtype) if config.guidance_embeds else None,
            return_dict=False,
            **model_arguments,
        )
        if before_step is not None:
            before_step(step, call)
        with torch.no_grad():  # around the call only: a generator must not leave it on between its steps
            latents = latents + (times[step + 1] - times[step]) * transformer(**call)[0]
        yield latents


def halfway(differences: Iterable[float | None]) -> float:
    """A threshold that half of the measured differences are below, and none near: for models whose numbers may change.

    A run of that threshold hits: until its first hit it is the run that these differences come from.
    """
    measured = sorted(difference for difference in differences if difference is not None)
    middle = len(measured) // 2
    return (measured[middle - 1] + measured[middle]) / 2


def position_ids(height: int, width: int) -> Tensor:
    """(height * width, 3): zero, row, column of every image token; a new object at every call, so a new run."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def blocks_of(transformer: FluxTransformer2DModel) -> list[torch.nn.Module]:
    """All blocks, in the order of the network."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def executions(transformer: FluxTransformer2DModel) -> AbstractContextManager[list[list[int]]]:
    """For each call of the model, the number of samples that each of its blocks is really executed for.

    Watches the first norm inside every block, which no cache replaces: a call of the block itself may be answered
    without running it.
    """
    return _passing(transformer, lambda block: block.norm1 if hasattr(block, "norm1") else block.norm)


def attentions(transformer: FluxTransformer2DModel) -> AbstractContextManager[list[list[int]]]:
    """For each call of the model, the number of samples that the attention of each of its blocks is computed for.

    What a block costs, also where a method skips inside blocks, or calls a block's norm to look at what it returns.
    """
    return _passing(transformer, lambda block: block.attn.to_q)


@contextmanager
def _passing(
    transformer: FluxTransformer2DModel, part: Callable[[torch.nn.Module], torch.nn.Module]
) -> Iterator[list[list[int]]]:
    """For each call of the model, the number of samples that pass through one part of each block."""
    calls: list[list[int]] = []
    blocks = blocks_of(transformer)

    def watch(index: int) -> Callable[..., None]:
        def executed(module: torch.nn.Module, args: tuple) -> None:
            calls[-1][index] += args[0].shape[0]

        return executed

    hooks = [part(block).register_forward_pre_hook(watch(index)) for index, block in enumerate(blocks)]
    try:
        with before_each_call(transformer, lambda: calls.append([0] * len(blocks))):
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def before_each_call(module: torch.nn.Module, note: Callable[[], Any]) -> Iterator[None]:
    """Calls `note()` whenever the module is called, also where a cache answers without running it, as no hook sees."""
    kind = type(module)

    def called(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            note()
        return super(kind, self).__call__(*args, **kwargs)

    assert "__call__" not in vars(kind)
    kind.__call__ = called
    try:
        yield
    finally:
        del kind.__call__
