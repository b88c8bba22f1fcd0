"""Stage 5: the trained parts as a diffusers `HunyuanVideoPipeline` folder in float16."""

import argparse
import json
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

from tools.flux_mini.export import write_pipeline

from . import vae as autoencoder
from .transformer import SHIFT, load


def build_pipeline(work: Path, checkpoint: str) -> HunyuanVideoPipeline:
    """The pipeline of a transformer checkpoint in `work`, float32."""
    vae = autoencoder.load(work)
    vae.register_to_config(scaling_factor=json.loads((work / "latents.json").read_text())["scaling_factor"])
    denoiser = load(work / checkpoint).eval().requires_grad_(False)
    return HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=denoiser.llama,
        tokenizer=denoiser.llama_tokenizer,
        text_encoder_2=denoiser.clip,
        tokenizer_2=denoiser.clip_tokenizer,
        transformer=denoiser.transformer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", default="distilled.pt")
    parser.add_argument("--folder", type=Path, default=Path("assets/hunyuan-mini"))
    options = parser.parse_args()
    write_pipeline(build_pipeline(options.work, options.checkpoint), options.folder)


if __name__ == "__main__":
    main()
