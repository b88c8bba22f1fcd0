"""What a run has to say for itself, in the terminal."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from eval.generate import Drawing
from eval.metrics import psnr, ssim
from eval.timeline import Timeline, decision_table


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


def comparison(cached: Drawing, baseline: Drawing) -> dict[str, str]:
    """What a cached drawing gains and loses against the baseline."""
    distance = psnr(cached.image, baseline.image)
    with_all = baseline.total_seconds / cached.total_seconds
    without = baseline.denoising_seconds / cached.denoising_seconds
    return {
        "baseline": timing(baseline),
        "speedup": f"{with_all:.2f}x with text encoding and VAE, {without:.2f}x without (one run each)",
        "likeness": ("identical images" if math.isinf(distance) else f"PSNR {distance:.2f} dB")
        + f", SSIM {ssim(cached.image, baseline.image):.4f}",
    }
