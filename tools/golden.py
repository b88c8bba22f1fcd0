"""Proves that a change of the code changed no bit of any image and no decision.

`python -m tools.golden record FILE` runs every case and writes what came out: {case: {"images": SHA-256 of the float32
bytes, "trace": SHA-256 of the trace's rows, "rows": their number, "decisions": how many of each, by stage}}. After the
change `python -m tools.golden compare FILE` runs them again, prints the cases that differ, and exits with 1 if any do.

Plans have no case: a plan is a scheduler, which sums in float32 what the engine once added step by step, so that its
images are those of before within rounding only. tests/h2cache/plans/test_scheduler.py compares them with the sum.

Bits belong to one machine and one torch version: record and compare on the same one, and never commit the file. Where
the cases called `none` differ, which run without a cache, it is the machine or torch that changed.
"""

import os

# Before anything imports torch or a hub client, as in tests/conftest.py: sums that are split otherwise round otherwise.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

import h2cache
from h2cache import CacheConfig, H2CacheConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.eval.files import REPOSITORY

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/support"))

from loops import denoise
from tiny import TEXT_TOKENS, save_tiny_pipeline, tiny_transformer

# TaylorSeer and HiCache at stage granularity named their stages after the blocks; the refactoring of the engine gives
# them the names of H2-Cache's stages. Nothing else about them is to change, so the old name counts as the new one.
STAGES = {"double": "structure", "single": "detail"}


def two(kind: Callable[..., CacheConfig], first: dict, second: dict, **both: Any) -> tuple[CacheConfig, CacheConfig]:
    """A method at two settings, and what they share."""
    return kind(**both, **first), kind(**both, **second)


# Every method at two settings, which skip and compute on all the models. The first is that of
# tests/support/methods_under_test.py, if the method is there.
h2 = partial(two, H2CacheConfig)
LOW, HIGH = dict(tau1=0.23, tau2=0.26), dict(tau1=0.3, tau2=0.35)
THREE, FOUR = dict(interval=3), dict(interval=4)
METHODS: dict[str, tuple[CacheConfig | None, ...]] = {
    "none": (None,),
    "h2-reuse": h2(HIGH, LOW),
    "h2-pooled": h2(HIGH | dict(pool1=4, pool2=6), LOW | dict(pool1=8, pool2=3)),
    "h2-taylor": h2(HIGH | dict(warmup_steps=2), LOW | dict(order=2), forecast="taylor"),
    "h2-hermite": h2(HIGH | dict(order=2), LOW | dict(sigma=0.3), forecast="hermite"),
    "h2-flat": h2(HIGH, LOW, hierarchical=False),
    "h2-structure": h2(HIGH, LOW | dict(forecast="taylor"), stages="structure"),
    "h2-detail": h2(HIGH, LOW | dict(tau2=0.3, forecast="taylor"), stages="detail"),
    "h2-mean": h2(HIGH, LOW | dict(hierarchical=False), batch_decision="mean"),
    "h2-limited": h2(dict(max_consecutive_hits=1), dict(max_consecutive_hits=3), tau1=0.6, tau2=math.inf),
    "block-cache": two(BlockCacheConfig, dict(threshold=0.3), dict(threshold=0.23)),
    "teacache": (TeaCacheConfig(0.4, (1.0, 0.0)), TeaCacheConfig(0.3, (2.0, 0.5, 0.01), num_steps=9)),
    "taylorseer": two(TaylorSeerConfig, THREE, FOUR | dict(order=2)),
    "taylorseer-stage": two(TaylorSeerConfig, FOUR | dict(order=2), THREE | dict(order=0), granularity="stage"),
    "hicache": two(HiCacheConfig, THREE | dict(order=2), FOUR | dict(sigma=0.7)),
    "hicache-stage": two(HiCacheConfig, THREE | dict(order=2), FOUR | dict(sigma=0.7), granularity="stage"),
    "hicache-auto": two(HiCacheConfig, THREE, FOUR | dict(order=2), sigma="auto"),
    "hicache-auto-stage": two(HiCacheConfig, THREE, FOUR | dict(order=2), sigma="auto", granularity="stage"),
    "hicache-taylor": two(HiCacheConfig, THREE, FOUR | dict(order=2), basis="taylor"),
    "clusca": two(ClusCaConfig, THREE | dict(clusters=3), FOUR | dict(clusters=5, propagation=0.2, seed=1)),
    "clusca-hermite": two(ClusCaConfig, THREE, FOUR | dict(order=2, sigma=0.7), clusters=3, forecast="hermite"),
    "clusca-input": two(ClusCaConfig, THREE, FOUR | dict(forecast="hermite"), clusters=3, fresh="input"),
}
# flux-mini takes longer: these alone draw three images on it.
IN_BATCHES = ("none", "h2-pooled", "h2-flat", "h2-mean", "block-cache", "teacache", "hicache-auto-stage", "clusca")


def cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names (model/method/setting), and what runs each case."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = load(save_tiny_pipeline(Path(folder)))
    mini, transformer = load(REPOSITORY / "assets/flux-mini"), tiny_transformer(double=2, single=3)
    three = ["a red stop sign", "yellow gate", "12 green doors"]
    signs = [f'a {kind} sign that says "STOP" in bold letters' for kind in ("red round", "blue square", "green round")]
    small = dict(height=64, width=64, num_inference_steps=12, max_sequence_length=TEXT_TOKENS, output_type="latent")
    guided = partial(draw, tiny, true_cfg_scale=3.0, **small)
    large = dict(height=128, width=128, max_sequence_length=40, output_type="pt")
    models: dict[str, tuple[object, Callable[[], Tensor]]] = {
        "tiny": (tiny, lambda: torch.cat([draw(tiny, prompts, **small) for prompts in (three[:1], three[1:2])])),
        "tiny-3": (tiny, lambda: draw(tiny, three, **small)),
        "tiny-guided": (tiny, lambda: guided(three[:1], negative_prompt=["blurry"])),
        "tiny-guided-3": (tiny, lambda: guided(three, negative_prompt=["blurry"] * 3)),
        "controlnet": (transformer, lambda: denoise(transformer, before_step=controlled(2, 3, range(12)))),
        "controlnet-3": (transformer, lambda: denoise(transformer, batch=3, before_step=controlled(1, 2, range(3, 9)))),
        "flux-mini": (mini, lambda: draw(mini, signs[:1], num_inference_steps=20, **large)),
        "flux-mini-3": (mini, lambda: draw(mini, signs, num_inference_steps=20, **large)),
    }
    for model, (target, images) in models.items():
        for method in METHODS if model != "flux-mini-3" else IN_BATCHES:
            for number, config in enumerate(METHODS[method], start=1):
                yield f"{model}/{method}/{number}", partial(outcome, target, config, images)


def load(folder: Path) -> FluxPipeline:
    """A pipeline in float32, without progress bar."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: FluxPipeline, prompts: list[str], **request: Any) -> Tensor:
    """One image a prompt, each from its own generator."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(prompts, generator=generators, **request).images


def controlled(double: int, single: int, steps: range) -> Callable[[int, dict[str, Any]], None]:
    """What gives so many ControlNet samples to the model at these steps, new ones at each and for each image."""

    def give(step: int, call: dict[str, Any]) -> None:
        if step in steps:
            generator, (batch, tokens, _) = torch.Generator().manual_seed(step), call["hidden_states"].shape
            samples = [0.2 * torch.randn(batch, tokens, 32, generator=generator) for _ in range(double + single)]
            call.update(controlnet_block_samples=samples[:double], controlnet_single_block_samples=samples[double:])

    return give


def outcome(target: object, config: CacheConfig | None, draw_images: Callable[[], Tensor]) -> dict[str, Any]:
    """What is kept of a case."""
    if config is None:
        images, rows, stages = draw_images(), [], {}
    else:
        with h2cache.apply(target, config) as handle:
            images = draw_images()
        rows, stages = [row_text(row) for row in handle.trace], handle.summary()["stages"]
    bits, text = images.float().contiguous().numpy().tobytes(), "\n".join(rows).encode()
    digests = dict(images=hashlib.sha256(bits).hexdigest(), trace=hashlib.sha256(text).hexdigest())
    counts = {STAGES.get(name, name): {str(key): n for key, n in stage.items() if n} for name, stage in stages.items()}
    return digests | dict(rows=len(rows), decisions=counts)


def row_text(row: Any) -> str:
    """A row of the trace with all digits of its numbers; of the timestep, six after the point."""
    place = row.run, row.step, round(row.timestep, 6), row.context, row.sample, STAGES.get(row.stage, row.stage)
    difference = None if row.diff is None else float(row.diff)
    return repr((*place, difference, float(row.threshold), str(row.decision), row.blocks_computed))


def compare(before: dict[str, dict[str, Any]]) -> bool:
    """Whether all cases come out as `before`; prints those that do not."""
    before = {name: outcome for name, outcome in before.items() if "/plan/" not in name}  # of files from before
    runs, differing = dict(cases()), 0
    for name in before | runs:
        try:
            now, then = runs[name](), before[name]
            parts = [part for part in now if now[part] != then[part]]
        except Exception as error:  # a case that breaks or is new or gone; the others are still to be seen
            parts = [f"raises {error!r}"]
        if parts:
            differing += 1
            print(f"{name}: {', '.join(parts)}", flush=True)
    print(f"{differing} of {len(before | runs)} cases differ")
    return not differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if REPOSITORY not in Path(h2cache.__file__).resolve().parents:
        parser.error(f"{h2cache.__file__} would run, which is not in {REPOSITORY}: start in that folder")
    torch.set_num_threads(1)
    if arguments.action == "compare":
        return 0 if compare(json.loads(arguments.file.read_text(encoding="utf-8"))) else 1
    outcomes = {name: run() for name, run in cases()}
    arguments.file.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    print(f"{len(outcomes)} cases recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
