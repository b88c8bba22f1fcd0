"""Measures what MagCache needs to know of a model: `python -m tools.magcache_ratios flux-mini`.

MagCache skips a step while it can guess the size of the residual that the blocks would add. The guess is a ratio for
each step: the residual's mean magnitude over that of the step before. diffusers' own calibration measures them, here
averaged over prompts of which no evaluation uses one. The result is the model's file in configs/magcache.
"""

import argparse
import ast
import contextlib
import io
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.progress import track

from h2cache.eval.files import CONFIGS, atomic_files
from h2cache.eval.generation.backends import applied, diffusers_cache
from h2cache.eval.generation.generate import generate
from h2cache.eval.models.pipelines import ModelConfig, describe_machine, load_pipeline
from tools.calibration_prompts import calibration_prompts


def magnitude_ratios(pipe: DiffusionPipeline, prompts: Sequence[str], model: ModelConfig) -> list[float]:
    """One a step, the mean over prompts; prompt i has the noise of seed i."""
    calibrating = diffusers_cache("MagCacheConfig", calibrate=True, num_inference_steps=model.num_inference_steps)
    found = []
    for seed, prompt in enumerate(track(prompts, "drawing", console=Console(stderr=True), transient=True)):
        printed = io.StringIO()  # the only way it tells
        with applied(pipe, calibrating), contextlib.redirect_stdout(printed):
            generate(pipe, prompt, seed, **model.call_arguments)
        (ratios,) = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1")]
        found.append(ratios)
    return [statistics.mean(ratios) for ratios in zip(*found, strict=True)]


def render(name: str, images: int, machine: str, ratios: Sequence[float]) -> str:
    """The model's file in configs/magcache."""
    values = textwrap.fill(", ".join(f"{ratio:.5f}" for ratio in ratios), 116)
    return (
        f"# MagCache's ratios of {name}. Written by\n"
        f"#     python -m tools.magcache_ratios {name} --images {images}\n"
        f"# on {machine}.\n"
        f"num_inference_steps: {len(ratios)}\n"
        f"mag_ratios: [\n{textwrap.indent(values, '  ')}\n]\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="of configs/model")
    parser.add_argument("--images", type=int, default=8, help="to average over, one a prompt")
    parser.add_argument("--prompts-file", type=Path, help="one prompt a line; without it scenes of flux-mini")
    options = parser.parse_args()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        model = instantiate(compose("run", overrides=[f"model={options.model}", "method=none"]).model)
    prompts = calibration_prompts(options.prompts_file, options.images, seed=0)
    ratios = magnitude_ratios(load_pipeline(model), prompts, model)
    with atomic_files([CONFIGS / f"magcache/{options.model}.yaml"]) as (file,):
        file.write_text(render(options.model, len(prompts), describe_machine(model), ratios), encoding="utf-8")


if __name__ == "__main__":
    main()
