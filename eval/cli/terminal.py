"""What a run has to say for itself, in the terminal."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from h2cache.eval.cli.timeline import Timeline, decision_table
from h2cache.eval.generation.generate import Drawing
from h2cache.eval.metrics.images import psnr, ssim


def show(console: Console, prompt: str, settings: str, trace: pd.DataFrame, facts: Mapping[str, str]) -> None:
    """Print the prompt, the trace of the run as timeline and table (unless it is empty), and the facts, one a row."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    for name, value in facts.items():
        table.add_row(name, Text(value))
    picture = [Timeline(trace), "", decision_table(trace), ""] if len(trace) else []
    parts = [Text(prompt, style="bold"), Text(settings, style="dim"), "", *picture, table]
    console.print(Padding(Group(*parts), (1, 0, 0, 2), expand=False))


def timing(drawing: Drawing) -> str:
    """Seconds with and without text encoding and VAE."""
    text, denoising, vae = drawing.text_seconds, drawing.denoising_seconds, drawing.vae_seconds
    total = drawing.total_seconds
    return f"{total:.2f} s with text encoding ({text:.2f}) and VAE ({vae:.2f}), {denoising:.2f} s without"


def bound(summary: Mapping[str, Any]) -> str:
    """The share of the blocks that ran, and the speedup if everything else were free."""
    fraction, speedup = summary["computed_fraction"], summary["max_speedup"]
    return f"{fraction:.1%} computed: at most {speedup:.2f}x as fast as computing all"


def sigmas(summary: Mapping[str, Any]) -> dict[str, str]:
    """The scales that the forecasts took, by stage; empty where they have none."""
    ranges = {stage: dict.fromkeys(f"{end:.2f}" for end in ends) for stage, ends in summary.get("sigma", {}).items()}
    words = ", ".join(f"{stage} {' to '.join(ends)}" for stage, ends in ranges.items())
    return {"sigma": words} if words else {}


def comparison(cached: Drawing, baseline: Drawing) -> dict[str, str]:
    """What a cached drawing gains and loses against the baseline."""
    with_all = baseline.total_seconds / cached.total_seconds
    without = baseline.denoising_seconds / cached.denoising_seconds
    return {
        "baseline": timing(baseline),
        "speedup": f"{with_all:.2f}x with text encoding and VAE, {without:.2f}x without (one run each)",
        "likeness": _likeness(cached, baseline),
    }


def _likeness(cached: Drawing, baseline: Drawing) -> str:
    """PSNR and SSIM; of a video the mean over the frames, and the worst frame."""
    pairs = list(zip(cached.frames, baseline.frames, strict=True))
    distances = [psnr(*pair) for pair in pairs]
    similarity = f"SSIM {fmean(ssim(*pair) for pair in pairs):.4f}"
    different = [distance for distance in distances if math.isfinite(distance)]
    if not different:
        return f"identical {'videos' if cached.is_video else 'images'}, {similarity}"
    if not cached.is_video:
        return f"PSNR {distances[0]:.2f} dB, {similarity}"
    worst = min(distances)
    same = len(distances) - len(different)
    identical = f" over the {len(different)} frames that differ" if same else ""
    return (
        f"PSNR per frame {fmean(different):.2f} dB in the mean{identical}, "
        f"{worst:.2f} dB at the worst (frame {distances.index(worst)}), {similarity} in the mean"
    )
