"""Small experiments' results: numbers chosen by hand, images that differ where we say, traces that we know."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from h2cache.eval.report.results import BASELINE, Results

SIZE = 32
STEPS = 6
# What one image's two stages did: (diff, decision) of each step. NaN: nothing was compared.
STRUCTURE = [
    *((math.nan, "warmup"), (0.1, "hit"), (0.2, "compute"), (0.05, "hit"), (math.nan, "compute"), (0.12, "hit")),
]
DETAIL = [
    *((math.nan, "warmup"), (math.nan, "forced"), (0.3, "compute"), (math.nan, "forced")),
    *((0.21, "hit"), (math.nan, "forced")),
]
THRESHOLDS = {"structure": 0.15, "detail": 0.22}


def trace() -> pd.DataFrame:
    """A run in which every kind of decision occurs, with the columns of `handle.trace.to_pandas()`."""
    rows = [
        {
            **{"run": 3, "step": step, "timestep": 1 - step / STEPS, "context": "None", "sample": 0, "stage": stage},
            **{"diff": diff, "threshold": THRESHOLDS[stage], "decision": decision, "blocks_computed": 1},
            "sigma": math.nan,
        }
        for step in range(STEPS)
        for stage, (diff, decision) in (("structure", STRUCTURE[step]), ("detail", DETAIL[step]))
    ]
    return pd.DataFrame(rows)


def picture(shift: int, at: tuple[int, int] = (20, 8)) -> Image.Image:
    """A grey ramp whose 4x4 pixels from `at` (x, y) on are brighter by `shift`."""
    pixels = np.linspace(0, 120, SIZE * SIZE * 3).reshape(SIZE, SIZE, 3).astype(np.uint8)
    x, y = at
    pixels[y : y + 4, x : x + 4] += np.uint8(shift)
    return Image.fromarray(pixels)


def row(folder: Path, setting: str, method: str, prompt_id: str, prompt: str, seconds: float, **values) -> dict:
    """A row of the frame; on disk its image, `picture(shift, at)`, and its trace unless it is the baseline."""
    name = f"{setting}-{prompt_id}".replace("/", "_").replace(" ", "_")[:60]
    number = len(list(folder.glob("*.png")))
    image = folder / f"{number:03d}-{name}.png"
    picture(values.pop("shift", 0), values.pop("at", (20, 8))).save(image)
    path = None
    if method != BASELINE:
        path = image.with_suffix(".csv")
        values.pop("trace", trace()).to_csv(path, index=False)
    return {
        **{"setting": setting, "method": method, "fields": {}, "prompt_id": prompt_id, "prompt": prompt, "word": None},
        **{"seed": 0, "fingerprint": image.stem, "image": image, "trace": path, "peak_memory_bytes": math.nan},
        **{"total_seconds": seconds + 0.5, "text_seconds": 0.2, "denoising_seconds": seconds, "vae_seconds": 0.3},
        **{"backend": "h2cache", "scheduler": None, "solver": "FlowMatchEulerDiscreteScheduler", "steps": 50},
        **{
            "computed_fraction": 1.0,
            "evaluations": 50.0,
            "hit_rates": {},
            "psnr": math.nan,
            "ssim": math.nan,
            "clipiqa": math.nan,
        },
        **values,
    }


def results(rows: list[dict], **changes) -> Results:
    values = {
        "name": "experiment",
        "title": "An experiment",
        "description": "What it is about.",
        "frame": pd.DataFrame(rows),
        "metrics": ("psnr", "ssim", "clipiqa"),
        "unavailable": {"clipiqa": "its weights cannot be fetched"},
        "model": "flux-mini",
        "machine": "a CPU (1 threads)",
        "command": "python -m eval",
        "converged_run": "400 steps",
    }
    return Results(**values | changes)


def grid(folder: Path) -> Results:
    """A baseline and H2-Cache at three of the four corners of a grid, on three prompts; the speedups are 2, 3 and 4."""
    rows = []
    for number in range(3):
        prompt = {"prompt_id": f"sign{number}", "prompt": f'a sign that says "{number}"'}
        base = 4.0 * (number + 1)
        rows.append(row(folder, BASELINE, BASELINE, seconds=base, psnr=math.inf, ssim=1.0, **prompt))
        for tau1, tau2, speedup, psnr in ((0.05, 0.1, 2, 40.0), (0.15, 0.1, 3, 35.0), (0.15, 0.22, 4, 30.0)):
            rows.append(
                row(
                    *(folder, f"H2-Cache, tau1 = {tau1}, tau2 = {tau2}", "H2-Cache"),
                    seconds=base / speedup,
                    fields={"tau1": tau1, "tau2": tau2},
                    computed_fraction=1 / speedup,
                    hit_rates={"structure": 0.5, "detail": 0.75},
                    psnr=psnr + number,
                    ssim=0.99,
                    shift=10 * speedup,
                    **prompt,
                )
            )
    return results(rows)


def rivals(folder: Path) -> Results:
    """Four methods, one of them unknown to the style sheet, at the settings (speedup, PSNR, SSIM) below."""
    points = {
        "H2-Cache": [(2.0, 38.0, 0.99), (3.0, 33.0, 0.98), (2.5, 32.0, 0.97)],
        "TeaCache": [(2.0, 44.0, 0.995), (3.5, 36.0, 0.985)],
        "HiCache": [(4.0, 37.0, 0.99)],
        "Mine": [(1.5, 30.0, 0.9)],
    }
    rows = []
    for number in range(4):
        prompt = {"prompt_id": f"p{number}", "prompt": "a sign"}
        rows.append(row(folder, BASELINE, BASELINE, seconds=8.0, psnr=math.inf, ssim=1.0, **prompt))
        for method, settings in points.items():
            for index, (speedup, psnr, ssim) in enumerate(settings):
                values = {"psnr": psnr + 0.1 * number, "ssim": ssim, "computed_fraction": 1 / speedup}
                rows.append(row(folder, f"{method}, {index}", method, seconds=8 / speedup, **values, **prompt))
    return results(rows)
