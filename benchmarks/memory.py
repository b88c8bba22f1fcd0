"""What each method would hold at FLUX.1-dev, 1024x1024, bfloat16: `python -m benchmarks.memory` prints the table.

Counted in the tensors that the engine really keeps, for the settings of `configs/experiment/methods.yaml`.

The full-size transformer runs on the meta device, where tensors have shapes and no data, until the method's memory is
full. Nothing can be compared there, so a method with a probe makes its first step only, which fills its memory if it
reuses. A plan needs no transformer; its scheduler makes a whole run.
"""

from collections.abc import Iterator

import torch
from diffusers import FluxTransformer2DModel
from hydra import compose, initialize_config_dir

import h2cache
from h2cache import CacheConfig, PlanConfig, PlanScheduler
from h2cache.eval.experiments.study import read_study
from h2cache.eval.files import CONFIGS

IMAGE_TOKENS, TEXT_TOKENS = 4096, 512


def flux1_dev() -> FluxTransformer2DModel:
    """The 12 billion parameters of FLUX.1-dev, without data."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16).eval()


def held_bytes(transformer: FluxTransformer2DModel, config: CacheConfig, image: int, text: int) -> int:
    """The most bytes that `config` holds for one image and guidance branch of so many tokens.

    `transformer` is on the meta device. ValueError for a method that extrapolates and measures.
    """
    if isinstance(config, PlanConfig):
        channels = transformer.config.in_channels
        return _plan_bytes(config, torch.empty(1, image, channels, dtype=transformer.dtype, device="meta"))
    stages = config.compose()
    measures = any(stage.probe is not None for stage in stages)
    order = max(stage.forecast.order for stage in stages)
    if measures and order > 0:
        raise ValueError(f"{config}: a method that compares and extrapolates cannot be followed without data")
    most, steps = 0, calls(transformer, image, text)
    with h2cache.apply(transformer, config) as handle:
        while handle.summary()["steps"] == 0 or (not measures and _computed(handle) < 3 + order):
            next(steps)
            most = max(most, handle.held_bytes())
    return most


@torch.no_grad()
def calls(transformer: FluxTransformer2DModel, image: int, text: int) -> Iterator[None]:
    """The calls of one endless run on the meta device."""
    config = transformer.config

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=transformer.dtype, device="meta")

    img_ids, txt_ids = (torch.empty(tokens, 3, device="meta") for tokens in (image, text))
    prompt, pooled = empty(1, text, config.joint_attention_dim), empty(1, config.pooled_projection_dim)
    while True:
        transformer(
            hidden_states=empty(1, image, config.in_channels),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=empty(1),
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=empty(1),
        )
        yield


def _computed(handle: h2cache.Handle) -> int:
    """Steps so far that computed the last stage: differences of order k need k + 1 of them."""
    last = list(handle.summary()["stages"].values())[-1]
    return last["warmup"] + last["compute"]


def _plan_bytes(config: PlanConfig, latents: torch.Tensor) -> int:
    """The most bytes that the plan's scheduler holds for latents like these."""
    scheduler = PlanScheduler(config.plan, allow_transfer=True)
    scheduler.set_timesteps(config.plan.steps)
    most = 0
    for timestep in scheduler.timesteps:
        scheduler.step(latents, timestep, latents)
        most = max(most, scheduler.held_bytes())
    return most


def main() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("eval", overrides=["experiment=methods"])
        study = read_study(cfg, "flux-mini", lambda option: compose("run", overrides=[f"method={option}"]).method)
    cached = [setting for setting in study.experiments[0].settings if setting.config is not None]
    first = {setting.method: setting for setting in reversed(cached)}  # thresholds and intervals change nothing
    transformer = flux1_dev()
    print("| method | held for one image at FLUX.1-dev |\n|---|---:|")
    for setting in reversed(first.values()):
        held = held_bytes(transformer, setting.config, IMAGE_TOKENS, TEXT_TOKENS)
        print(f"| {setting.name} | {f'{held / 1e6:,.0f} MB' if held < 1e9 else f'{held / 1e9:.1f} GB'} |")


if __name__ == "__main__":
    main()
