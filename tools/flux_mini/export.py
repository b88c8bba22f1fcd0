"""Stage 5: the trained parts as a diffusers `FluxPipeline` folder in float16."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline

from . import vae as autoencoder
from .transformer import SHIFT, TOKENS, load


def build_pipeline(work: Path, checkpoint: str) -> FluxPipeline:
    """The pipeline of a transformer checkpoint in `work`, float32."""
    meta = json.loads((work / "latents.json").read_text())
    vae = autoencoder.load(work)
    vae.register_to_config(shift_factor=meta["shift_factor"], scaling_factor=meta["scaling_factor"])
    denoiser = load(work / checkpoint).eval().requires_grad_(False)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=SHIFT,
            max_shift=1.15,
            base_image_seq_len=TOKENS,
            max_image_seq_len=4096,
        ),
        vae=vae,
        text_encoder=denoiser.clip,
        tokenizer=denoiser.clip_tokenizer,
        text_encoder_2=denoiser.t5,
        tokenizer_2=denoiser.t5_tokenizer,
        transformer=denoiser.transformer,
    )


def write_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in float16 beside `folder` and move it into place; what else lies in `folder` (the model card)
    is kept."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(partial)
    for encoder in ("text_encoder", "text_encoder_2"):
        # transformers would load them in the dtype they were saved in, diffusers loads everything else in float32.
        config = partial / encoder / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    folder.mkdir(parents=True, exist_ok=True)
    for item in partial.iterdir():
        target = folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        item.replace(target)
    partial.rmdir()


def export(work: Path, checkpoint: str, folder: Path) -> None:
    """Write the pipeline of a checkpoint in `work` to `folder`."""
    write_pipeline(build_pipeline(work, checkpoint), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", default="distilled.pt")
    parser.add_argument("--folder", type=Path, default=Path("assets/flux-mini"))
    options = parser.parse_args()
    export(options.work, options.checkpoint, options.folder)


if __name__ == "__main__":
    main()
