"""Every method at three settings, on the embedded model: `python -m benchmarks.methods`, the table of docs/methods.md.

Every setting draws the same held-out prompts with the same seeds as the uncached pipeline. Blocks are the fraction
computed; speedup is the median, over prompts, of the ratio of denoising times, the settings taken in turns; PSNR and
SSIM are against the uncached image; memory is what one image holds at FLUX.1-dev, 1024x1024, bfloat16 (`memory.py`).
Also draws the README's picture: six prompts without a cache above, with H2-Cache at its published thresholds below.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import track

import h2cache
from baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from eval.generation.generate import generate
from eval.metrics.images import psnr, ssim
from eval.models.pipelines import load_pipeline
from h2cache import CacheConfig, H2CacheConfig, PlanConfig

from .memory import IMAGE_TOKENS, TEXT_TOKENS, flux1_dev, held_bytes

ROOT = Path(__file__).resolve().parents[1]
H2_THRESHOLDS = ((0.05, 0.10), (0.10, 0.15), (0.15, 0.22))  # the last are the published ones
BLOCK_THRESHOLDS = (0.05, 0.08, 0.12)  # diffusers' default, and nunchaku's
TEA_THRESHOLDS = (0.05, 0.08, 0.14)  # around the default of configs/teacache/flux-mini.yaml
INTERVALS = (3, 5, 7)
BUDGETS = (3, 4, 6)  # of the calibrated plans
HEADER = (
    "| method | setting | blocks computed | denoising speedup | PSNR, dB | SSIM | memory at FLUX.1-dev |\n"
    "|---|---|---:|---:|---:|---:|---:|"
)


@dataclass
class Setting:
    """A method's configuration and what was measured with it, one value a prompt."""

    method: str
    name: str
    config: CacheConfig
    blocks: list[float] = field(default_factory=list)
    speedup: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    def row(self, held: int) -> str:
        values = (
            f"{100 * statistics.mean(self.blocks):.1f} %",
            f"{statistics.median(self.speedup):.2f}x",
            f"{statistics.mean(self.psnr):.2f}",
            f"{statistics.mean(self.ssim):.4f}",
            f"{held / 1e6:,.0f} MB" if held < 1e9 else f"{held / 1e9:.1f} GB",
        )
        return f"| {self.method} | {self.name} | " + " | ".join(values) + " |"


def settings() -> list[Setting]:
    """What is compared."""
    tea = OmegaConf.load(ROOT / "configs/teacache/flux-mini.yaml")
    h2 = {f"tau1 = {a}, tau2 = {b}": H2CacheConfig(tau1=a, tau2=b) for a, b in H2_THRESHOLDS}
    rows = [Setting("H2-Cache", name, config) for name, config in h2.items()]
    rows += [Setting("Block Cache", f"threshold = {t}", BlockCacheConfig(t)) for t in BLOCK_THRESHOLDS]
    rows += [
        Setting("TeaCache", f"threshold = {t}", TeaCacheConfig(t, tuple(tea.coefficients))) for t in TEA_THRESHOLDS
    ]
    scheduled = {
        "Reuse, stages": lambda n: TaylorSeerConfig(n, order=0, granularity="stage"),
        "TaylorSeer, stages": lambda n: TaylorSeerConfig(n, granularity="stage"),
        "HiCache, stages": lambda n: HiCacheConfig(n, granularity="stage"),
        "Reuse, modules": lambda n: TaylorSeerConfig(n, order=0),
        "TaylorSeer, modules": lambda n: TaylorSeerConfig(n),
        "HiCache, modules": lambda n: HiCacheConfig(n),
        "ClusCa": lambda n: ClusCaConfig(n),
        "ClusCa, fresh inputs": lambda n: ClusCaConfig(n, fresh="input"),
        "Hi-ClusCa": lambda n: ClusCaConfig(n, forecast="hermite"),
    }
    for method, config in scheduled.items():
        rows += [Setting(method, f"interval = {n}", config(n)) for n in INTERVALS]
    # Every run here is under the conditions of the plans; what they would hold at FLUX.1-dev is asked under others.
    plans = {f"budget = {n}": ROOT / f"assets/plans/flux-mini-{n}.json" for n in BUDGETS}
    return rows + [Setting("Plan", name, PlanConfig(file, allow_transfer=True)) for name, file in plans.items()]


def draw_rows(rows: list[list[Image.Image]], target: Path, columns: int = 6, scale: int = 2) -> None:
    """One row of images above the other, enlarged, without captions: the README's picture."""
    side = rows[0][0].width * scale
    sheet = Image.new("RGB", (columns * side, len(rows) * side))
    for y, row in enumerate(rows):
        for x, image in enumerate(row[:columns]):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x * side, y * side))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in `page`."""
    before, rest = page.read_text().split(f"<!-- {name} -->", 1)
    _, after = rest.split(f"<!-- /{name} -->", 1)
    page.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=80, help="how many of assets/prompts/signs80.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/methods.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/compare.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = instantiate(OmegaConf.load(ROOT / "configs/model/flux-mini.yaml"), device="cpu")
    pipe, call = load_pipeline(model), model.call_arguments
    lines = (ROOT / "assets/prompts/signs80.jsonl").read_text().splitlines()[: options.prompts]
    measured, plain_images = settings(), []
    generate(pipe, "warm-up", 0, **call)
    for seed, line in track(list(enumerate(lines)), description="prompts", console=Console(stderr=True)):
        prompt = json.loads(line)["prompt"]
        plain = generate(pipe, prompt, seed, **call)
        plain_images.append(plain.image)
        seconds = []
        for setting in measured:
            with h2cache.apply(pipe, setting.config) as handle:
                drawn = generate(pipe, prompt, seed, **call)
            seconds.append(drawn.denoising_seconds)
            setting.blocks.append(handle.summary()["computed_fraction"])
            setting.psnr.append(psnr(drawn.image, plain.image))
            setting.ssim.append(ssim(drawn.image, plain.image))
            setting.images.append(drawn.image)
        again = generate(pipe, prompt, seed, **call)
        baseline = (plain.denoising_seconds + again.denoising_seconds) / 2  # before and after: the machine is shared
        for setting, cached in zip(measured, seconds, strict=True):
            setting.speedup.append(baseline / cached)
    full_size, held = flux1_dev(), {}
    for setting in measured:  # a method holds the same at all of its settings
        if setting.method not in held:
            held[setting.method] = held_bytes(full_size, setting.config, IMAGE_TOKENS, TEXT_TOKENS)
    rows = [setting.row(held[setting.method]) for setting in measured]
    table = "\n".join([HEADER, *rows])
    command = f"`python -m benchmarks.methods --prompts {options.prompts} --threads {options.threads}`"
    write_between(options.page, "methods", f"{command}, {model.num_inference_steps} steps.\n\n{table}")
    published = next(setting for setting in measured if setting.config == H2CacheConfig())
    draw_rows([plain_images, published.images], options.picture)
    print(table)


if __name__ == "__main__":
    main()
