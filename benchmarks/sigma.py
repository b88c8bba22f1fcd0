"""How HiCache's sigma should be chosen: `python -m benchmarks.sigma` makes the second table of docs/methods.md.

Mean PSNR against the uncached image on held-out prompts of the embedded model, for sigmas fixed in advance and for two
rules that choose it during the run: the public analytic one, `min(sigma_max, alpha / (sqrt(2) q))` with q the magnitude
of the first difference over an interval relative to the features, alpha 1.28; and ours, backcasting.
"""

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import track

import h2cache
from baselines import HiCacheConfig, TaylorSeerConfig
from eval.generation.generate import generate
from eval.metrics.images import psnr
from eval.models.pipelines import load_pipeline
from h2cache.policy.forecasts import Forecast, Hermite

from .methods import write_between

ROOT = Path(__file__).resolve().parents[1]
INTERVALS, ORDERS = (3, 4, 5, 6, 7), (1, 2)
SIGMAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class AnalyticHermite(Hermite):
    """The rule that reviewers were given: the faster features change, the smaller sigma."""

    alpha: float = 1.28
    sigma_max: float = 0.95

    def fitted(self, products: list[list[float]], x: int) -> Forecast:
        magnitude = x * math.sqrt(products[2][2] / products[0][0])
        return Hermite(self.order, min(self.sigma_max, self.alpha / (math.sqrt(2) * magnitude)), self.first_difference)


@dataclass(frozen=True)
class AnalyticConfig(HiCacheConfig):
    """HiCache with the analytic rule."""

    def _forecast(self) -> Forecast:
        return AnalyticHermite(self.order, self.sigma, self.first_enhance - 1)


def mean_psnr(
    pipe: FluxPipeline, config: h2cache.CacheConfig, prompts: list[str], plain: list[Image.Image], call
) -> float:
    with h2cache.apply(pipe, config):
        drawn = [generate(pipe, prompt, seed, **call).image for seed, prompt in enumerate(prompts)]
    return statistics.mean(psnr(a, b) for a, b in zip(drawn, plain, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16, help="how many of assets/prompts/signs80.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--granularity", choices=("stage", "module"), default="stage")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/methods.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = instantiate(OmegaConf.load(ROOT / "configs/model/flux-mini.yaml"), device="cpu")
    pipe, call = load_pipeline(model), model.call_arguments
    lines = (ROOT / "assets/prompts/signs80.jsonl").read_text().splitlines()[: options.prompts]
    prompts = [json.loads(line)["prompt"] for line in lines]
    plain = [generate(pipe, prompt, seed, **call).image for seed, prompt in enumerate(prompts)]
    table = [
        "| order | interval | reuse | TaylorSeer | sigma 0.5 | best fixed sigma | analytic | backcast (auto) |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    cells = [(order, interval) for order in ORDERS for interval in INTERVALS]
    for order, interval in track(cells, description="settings", console=Console(stderr=True)):
        shared = dict(interval=interval, order=order, granularity=options.granularity)

        def score(config: h2cache.CacheConfig) -> float:
            return mean_psnr(pipe, config, prompts, plain, call)

        fixed = {sigma: score(HiCacheConfig(**shared, sigma=sigma)) for sigma in SIGMAS}
        best = max(fixed, key=fixed.get)
        scores = (
            score(TaylorSeerConfig(**shared | {"order": 0})),
            score(TaylorSeerConfig(**shared)),
            fixed[0.5],
            fixed[best],
            score(AnalyticConfig(**shared)),
            score(HiCacheConfig(**shared, sigma="auto")),
        )
        texts = [f"{value:.2f}" for value in scores]
        texts[3] += f" ({best})"
        table.append(f"| {order} | {interval} | " + " | ".join(texts) + " |")
    options_text = f"--prompts {options.prompts} --threads {options.threads} --granularity {options.granularity}"
    command = f"`python -m benchmarks.sigma {options_text}`, PSNR in dB."
    write_between(options.page, f"sigma-{options.granularity}", command + "\n\n" + "\n".join(table))
    print("\n".join(table))


if __name__ == "__main__":
    main()
