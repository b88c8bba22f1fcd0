"""What caching costs in fidelity and buys in work, on the embedded model: `python -m benchmarks.quality`.

Every setting draws the same prompts with the same seeds as the uncached pipeline. PSNR and SSIM are against the
uncached image; blocks are the fraction computed; time is the median, over prompts, of the ratio of denoising times,
the settings taken in turns. Writes its table to `benchmarks/results/quality.md` and the README's picture: six prompts
without a cache above, with H2-Cache at its published thresholds below.
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
from baselines import BlockCacheConfig
from eval.generate import generate
from eval.metrics import psnr, ssim
from eval.pipelines import load_pipeline
from h2cache import CacheConfig, H2CacheConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Setting:
    """A method's configuration and what was measured with it, one value a prompt."""

    name: str
    config: CacheConfig
    blocks: list[float] = field(default_factory=list)
    speedup: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    def row(self) -> str:
        values = (
            f"{100 * statistics.mean(self.blocks):.1f} %",
            f"{statistics.median(self.speedup):.2f}x",
            f"{statistics.mean(self.psnr):.2f}",
            f"{statistics.mean(self.ssim):.4f}",
        )
        return f"| {self.name} | " + " | ".join(values) + " |"


def settings() -> list[Setting]:
    pairs, thresholds = ((0.05, 0.10), (0.10, 0.15), (0.15, 0.22)), (0.05, 0.08, 0.12)
    h2 = [Setting(f"H2-Cache, tau1 = {a}, tau2 = {b}", H2CacheConfig(tau1=a, tau2=b)) for a, b in pairs]
    return h2 + [Setting(f"Block Cache, threshold = {t}", BlockCacheConfig(t)) for t in thresholds]


def draw_rows(rows: list[list[Image.Image]], target: Path, columns: int = 6, scale: int = 2) -> None:
    """One row of images above the other, enlarged, without captions: the README's picture."""
    side = rows[0][0].width * scale
    sheet = Image.new("RGB", (columns * side, len(rows) * side))
    for y, row in enumerate(rows):
        for x, image in enumerate(row[:columns]):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x * side, y * side))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16, help="how many of assets/prompts/signs80.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/quality.md")
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
        for setting in measured:
            with h2cache.apply(pipe, setting.config) as handle:
                drawn = generate(pipe, prompt, seed, **call)
            setting.blocks.append(handle.summary()["computed_fraction"])
            setting.speedup.append(plain.denoising_seconds / drawn.denoising_seconds)
            setting.psnr.append(psnr(drawn.image, plain.image))
            setting.ssim.append(ssim(drawn.image, plain.image))
            setting.images.append(drawn.image)
    table = [
        "| method | blocks computed | denoising speedup | PSNR, dB | SSIM |",
        "|---|---:|---:|---:|---:|",
        *(setting.row() for setting in measured),
    ]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    command = f"`python -m benchmarks.quality --prompts {options.prompts} --threads {options.threads}`"
    options.results.write_text(f"{command}, {model.num_inference_steps} steps.\n\n" + "\n".join(table) + "\n")
    published = next(setting for setting in measured if setting.config == H2CacheConfig())
    draw_rows([plain_images, published.images], options.picture)
    print("\n".join(table))


if __name__ == "__main__":
    main()
