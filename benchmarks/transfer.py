"""How far a plan serves under conditions that it was not calibrated for: `python -m benchmarks.transfer`.

Mean PSNR against the uncached image on held-out prompts of the embedded model, of a plan of `assets/plans` carried over
(`allow_transfer`), and of HiCache, whose interval is the longest at which it computes at least as many steps as the
plan. Writes its table into docs/frontier.md.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import track

import h2cache
from baselines import HiCacheConfig
from eval.generation.generate import generate
from eval.metrics.images import psnr
from eval.models.pipelines import load_pipeline
from h2cache import CacheConfig, Plan, PlanConfig
from h2cache.policy.rules import Interval

from .methods import write_between

ROOT = Path(__file__).resolve().parents[1]
CONDITIONS: dict[str, dict[str, Any]] = {
    "as calibrated": {},
    "96 x 128": {"height": 96},
    "160 x 160": {"height": 160, "width": 160},
    "guidance 2.5": {"guidance_scale": 2.5},
    "guidance 5": {"guidance_scale": 5.0},
    "30 steps": {"num_inference_steps": 30},
    "40 steps": {"num_inference_steps": 40},
    "100 steps": {"num_inference_steps": 100},
}


def computed_steps(config: HiCacheConfig, steps: int) -> int:
    """Of `steps`, by the method's schedule."""
    rule = Interval(config.interval, config.first_enhance)
    since, computed = 0, 0
    for step in range(steps):
        if step < rule.first_enhance or since == rule.interval - 1:
            since, computed = 0, computed + 1
        else:
            since += 1
    return computed


def rival(computed: int, steps: int) -> HiCacheConfig:
    """HiCache that computes at least as many of the steps, and no more than it must."""
    configs = [HiCacheConfig(interval, granularity="stage", sigma="auto") for interval in range(1, steps + 1)]
    return next(config for config in reversed(configs) if computed_steps(config, steps) >= computed)


def mean_psnr(
    pipe: FluxPipeline, config: CacheConfig, prompts: list[str], plain: list[Image.Image], call: dict[str, Any]
) -> tuple[float, float]:
    """And the fraction of the blocks that were computed."""
    with h2cache.apply(pipe, config) as handle:
        drawn = [generate(pipe, prompt, seed, **call).image for seed, prompt in enumerate(prompts)]
    distances = [psnr(a, b) for a, b in zip(drawn, plain, strict=True)]
    return statistics.mean(distances), handle.summary()["computed_fraction"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=ROOT / "assets/plans/flux-mini-4.json")
    parser.add_argument("--prompts", type=int, default=16, help="how many of assets/prompts/signs80.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/frontier.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = instantiate(OmegaConf.load(ROOT / "configs/model/flux-mini.yaml"), device="cpu")
    pipe, plan = load_pipeline(model), Plan.load(options.plan)
    lines = (ROOT / "assets/prompts/signs80.jsonl").read_text().splitlines()[: options.prompts]
    prompts = [json.loads(line)["prompt"] for line in lines]
    table = ["| run under | plan computes | plan, dB | HiCache computes | HiCache, dB |", "|---|---:|---:|---:|---:|"]
    for name, changes in track(CONDITIONS.items(), description="conditions", console=Console(stderr=True)):
        call = model.call_arguments | changes
        plain = [generate(pipe, prompt, seed, **call).image for seed, prompt in enumerate(prompts)]
        ours, work = mean_psnr(pipe, PlanConfig(plan, allow_transfer=True), prompts, plain, call)
        steps = call["num_inference_steps"]
        config = rival(round(work * steps), steps)
        theirs, their_work = mean_psnr(pipe, config, prompts, plain, call)
        table.append(f"| {name} | {work:.0%} | {ours:.1f} | {their_work:.0%} | {theirs:.1f} |")
    command = f"`python -m benchmarks.transfer --prompts {options.prompts} --plan {options.plan.name}`"
    write_between(options.page, "transfer", f"{command}\n\n" + "\n".join(table))
    print("\n".join(table))


if __name__ == "__main__":
    main()
