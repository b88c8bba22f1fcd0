"""What the engine itself costs, on the embedded model: `python -m benchmarks.engine`.

Two ratios of median times, from calls interleaved in one process:
- a method that never hits, against the untouched transformer;
- a step at which everything hits, against the work that no cache can avoid: a transformer of the first blocks of each
  stage, with the model's own embedders and head.

Writes its table to `benchmarks/results/engine.md`.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

import h2cache
from baselines import BlockCacheConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache import CacheConfig, H2CacheConfig

ROOT = Path(__file__).resolve().parents[1]
TEXT_TOKENS = 40
IMAGE_SIDE = 8


class Loop:
    """An endless denoising run of one transformer: every call is one step later than the call before."""

    def __init__(self, transformer: FluxTransformer2DModel):
        config, generator = transformer.config, torch.Generator().manual_seed(0)
        grid = torch.arange(IMAGE_SIDE).float()
        rows, columns = torch.meshgrid(grid, grid, indexing="ij")
        tokens = IMAGE_SIDE**2
        self.transformer = transformer
        self.time = 1.0
        self.inputs = {
            "hidden_states": torch.randn(1, tokens, config.in_channels, generator=generator),
            "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, config.joint_attention_dim, generator=generator),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
            "guidance": torch.full((1,), 3.5),
            "img_ids": torch.stack([torch.zeros(tokens), rows.flatten(), columns.flatten()], dim=-1),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        }

    def step(self) -> float:
        """Seconds of one call."""
        self.time -= 1e-6
        started = time.perf_counter()
        self.transformer(timestep=torch.full((1,), self.time), **self.inputs)
        return time.perf_counter() - started


def first_blocks(transformer: FluxTransformer2DModel, double: int, single: int) -> FluxTransformer2DModel:
    """The same transformer, weights shared, with only its first blocks: the work of an all-hit step."""
    small = FluxTransformer2DModel.from_config(transformer.config, num_layers=double, num_single_layers=single)
    small.load_state_dict(transformer.state_dict(), strict=False, assign=True)
    return small.eval()


def interleaved(loops: list[Callable[[], float]], repeats: int) -> list[float]:
    """Median seconds of each, the calls taken in turns so that noise of the machine meets all alike."""
    for loop in loops:
        for _ in range(5):
            loop()
    samples = [[loop() for loop in loops] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def never_hit(transformer: FluxTransformer2DModel, config: CacheConfig, repeats: int) -> tuple[float, float]:
    """Median seconds of the plain and of the watched transformer."""
    plain, watched = Loop(transformer), Loop(transformer)

    def cached_step() -> float:
        with h2cache.apply(transformer, config):
            # The first call of a run has nothing to compare; time the second, which probes, compares and remembers.
            watched.step()
            return watched.step()

    return tuple(interleaved([plain.step, cached_step], repeats))


def all_hit(
    transformer: FluxTransformer2DModel, config: CacheConfig, mandatory: tuple[int, int], repeats: int
) -> tuple[float, float]:
    """Median seconds of the mandatory work and of a step at which every stage is skipped."""
    least = Loop(first_blocks(transformer, *mandatory))
    skipping = Loop(transformer)
    with h2cache.apply(transformer, config) as handle:
        medians = interleaved([least.step, skipping.step], repeats)
        decisions = handle.trace.to_pandas().decision.tail(repeats)
    if not decisions.isin(["hit", "forced"]).all():
        raise RuntimeError("a step that was timed as a hit was computed")
    return tuple(medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "assets/flux-mini")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/engine.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformer = FluxTransformer2DModel.from_pretrained(options.model, subfolder="transformer").float().eval()
    never, always = -1.0, float("inf")
    rows = []
    with torch.inference_mode():
        for name, config in (
            ("H2-Cache", H2CacheConfig(tau1=never, tau2=never)),
            ("Block Cache", BlockCacheConfig(threshold=never)),
            ("TeaCache", TeaCacheConfig(threshold=never)),
            ("TaylorSeer, stages", TaylorSeerConfig(interval=1, granularity="stage")),
            ("TaylorSeer, modules", TaylorSeerConfig(interval=1)),
        ):
            rows.append((f"{name}, never hits", "plain transformer", *never_hit(transformer, config, options.repeats)))
        for name, config, blocks in (
            ("H2-Cache", H2CacheConfig(tau1=always, tau2=always), (1, 1)),
            ("Block Cache", BlockCacheConfig(threshold=always), (1, 0)),
            ("TeaCache", TeaCacheConfig(threshold=always), (0, 0)),
            ("HiCache, stages", HiCacheConfig(interval=10**9, granularity="stage"), (0, 0)),
        ):
            medians = all_hit(transformer, config, blocks, options.repeats)
            mandatory = f"first {sum(blocks)} block(s), embedders and head" if sum(blocks) else "embedders and head"
            rows.append((f"{name}, all hits", mandatory, *medians))
    lines = [
        f"`python -m benchmarks.engine --repeats {options.repeats} --threads {options.threads}`: "
        f"{platform.machine()} CPU, torch {torch.__version__}, float32, {IMAGE_SIDE**2} + {TEXT_TOKENS} tokens, "
        "medians of interleaved calls.",
        "",
        "| case | against | against, ms | case, ms | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {case} | {against} | {1e3 * base:.2f} | {1e3 * cached:.2f} | {cached / base:.3f} |"
        for case, against, base, cached in rows
    ]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
