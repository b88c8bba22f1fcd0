"""What `benchmarks.pareto` writes: every setting as CSV, tables in the words of docs/frontier.md, and the picture."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from eval.files import atomic_files

from .frontier import Advantage, Point, Value, advantage, at_speedup, frontier, mean_interval
from .measure import Record
from .peers import OURS, Contender

SPEEDUPS = (3.0, 4.0, 6.0)
# Okabe and Ito's colours; their yellow is too faint for lines on white.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#882255", "#999933", "#332288")
MARKERS = "os^Dv<>P"
CHAMPION_COLOUR, GREY = "#d55e00", "#c8c8c8"


@dataclass(frozen=True, eq=False)
class Method:
    """All settings of one method that were compared, and the frontier among them."""

    library: str
    name: str
    points: list[Point]

    @property
    def frontier(self) -> list[Point]:
        return frontier(self.points)

    @property
    def label(self) -> str:
        return self.name if self.library == OURS else f"{self.library} {self.name}"


def methods(records: Sequence[Record], contenders: Sequence[Contender], phase: str) -> list[Method]:
    """From the records of a phase, of settings that were drawn with on every prompt of it."""
    chosen = [record for record in records if record.phase == phase]
    prompts = sorted({record.prompt for record in chosen})
    table = {(record.contender, record.prompt): record for record in chosen}
    found: dict[tuple[str, str], list[Point]] = {}
    for contender in contenders:
        rows = [table.get((contender.name, prompt)) for prompt in prompts]
        if rows and all(rows):
            found.setdefault((contender.library, contender.method), []).append(_point(contender.setting, rows))
    return [Method(library, name, points) for (library, name), points in found.items()]


def _point(setting: str, rows: Sequence[Record]) -> Point:
    return Point(
        setting,
        work=np.array([row.work for row in rows]),
        wall=np.array([row.plain_seconds / row.seconds for row in rows]),
        psnr=np.array([row.psnr for row in rows]),
        ssim=np.array([row.ssim for row in rows]),
    )


def write_csv(records: Sequence[Record], contenders: Sequence[Contender], target: Path) -> None:
    """One row a setting: means over the prompts, the 95 % interval of PSNR, the median speedup of denoising times."""
    header = "library method setting prompts work attentions wall_speedup psnr psnr_low psnr_high ssim lpips".split()
    with atomic_files([target]) as (temporary,), temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for contender in contenders:
            rows = [row for row in records if row.phase == "test" and row.contender == contender.name]
            if rows:
                psnr = mean_interval(np.array([row.psnr for row in rows]))
                wall = np.median([row.plain_seconds / row.seconds for row in rows])
                means = [np.mean([getattr(row, name) for row in rows]) for name in ("work", "attentions", "ssim")]
                lpips = [row.lpips for row in rows if row.lpips is not None]
                numbers = (*means[:2], wall, psnr.mean, psnr.low, psnr.high, means[2])
                texts = [f"{number:.5g}" for number in numbers]
                texts.append(f"{np.mean(lpips):.5g}" if lpips else "")
                writer.writerow([contender.library, contender.method, contender.setting, len(rows), *texts])


def table(every: Sequence[Method]) -> str:
    """Each method at equal speedups in blocks, best first, and where its sweep ends."""
    at = [f"{speedup:g}x" for speedup in SPEEDUPS]
    lines = [
        f"| method | {' | '.join(f'PSNR at {each}' for each in at)} | SSIM at 4x | denoising at 4x | fastest setting |",
        "|---|" + "---:|" * (len(at) + 3),
    ]
    for method in _best_first(every):
        points = method.frontier
        cells = [_interval(at_speedup(points, speedup, "psnr")) for speedup in SPEEDUPS]
        ssim, wall = (at_speedup(points, 4.0, what) for what in ("ssim", "wall"))
        cells.append("" if ssim is None else f"{ssim.mean():.4f}")
        cells.append("" if wall is None else f"{np.median(wall):.2f}x")
        cells.append(f"{points[-1].speedup:.1f}x, {points[-1].psnr.mean():.1f} dB")
        lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains(every: Sequence[Method], champion: Method) -> str:
    """How far the champion is ahead of each other method that reaches a speedup, prompt by prompt.

    And how much faster it is at the PSNR that the other has at 4x.
    """
    lines = [
        f"| {champion.label} ahead of | {' | '.join(f'at {speedup:g}x, dB' for speedup in SPEEDUPS)} | "
        "fewer blocks at its PSNR at 4x | faster there |",
        "|---|" + "---:|" * (len(SPEEDUPS) + 2),
    ]
    for method in _best_first(every):
        cells = []
        for speedup in SPEEDUPS:
            ours, theirs = (at_speedup(each.frontier, speedup, "psnr") for each in (champion, method))
            known = ours is not None and theirs is not None
            cells.append(_interval(ours - theirs, "{:+.1f} ({:+.1f} to {:+.1f})") if known else "")
        if method is not champion and any(cells):
            found = advantage(champion.frontier, method.frontier, 4.0)
            cells += ["", ""] if found is None else [_ratio(found, found.blocks), _ratio(found, found.wall)]
            lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best_first(every: Sequence[Method]) -> list[Method]:
    """By PSNR at 4x, then at 3x, for those that reach there."""
    return sorted(
        every,
        key=lambda method: [-_mean(at_speedup(method.frontier, speedup, "psnr")) for speedup in (4.0, 3.0)],
    )


def verdict(every: Sequence[Method], champion: Method, speedup: float = 4.0) -> str:
    """How much faster the champion is at the PSNR that the best peer, and the best of all others, has at `speedup`."""
    rivals = [method for method in _best_first(every) if method is not champion]
    reached = [method for method in rivals if at_speedup(method.frontier, speedup, "psnr") is not None]
    best = dict.fromkeys([*reached[:1], *[method for method in reached if method.library != OURS][:1]])
    sentences = [_sentence(method, champion, speedup) for method in best]
    return "\n\n".join(sentences) or f"Nothing else reaches {speedup:g}x."


def _sentence(best: Method, champion: Method, speedup: float) -> str:
    kind = "method" if best.library == OURS else "peer"
    psnr = _mean(at_speedup(best.frontier, speedup, "psnr"))
    start = f"The best other {kind} at {speedup:g}x is {best.label}, with {psnr:.1f} dB."
    found = advantage(champion.frontier, best.frontier, speedup)
    if found is None:
        return f"{start} The {champion.label} never comes so near to the uncached image."
    at = "at its fastest setting" if found.at_least else "at that PSNR"
    return (
        f"{start} The {champion.label} computes {_ratio(found, found.blocks)} times fewer blocks {at}, and denoises "
        f"{_ratio(found, found.wall)} times as fast."
    )


def _ratio(found: Advantage, value: Value) -> str:
    bound = "≥ " if found.at_least else ""
    return bound + f"{value.mean:.2f}" + ("" if math.isnan(value.low) else f" ({value.low:.2f} to {value.high:.2f})")


def _mean(values: np.ndarray | None) -> float:
    return -np.inf if values is None else float(values.mean())


def _interval(values: np.ndarray | None, form: str = "{:.1f} ({:.1f} to {:.1f})") -> str:
    if values is None:
        return ""
    value = mean_interval(values)
    return form.format(value.mean, value.low, value.high)


def draw(every: Sequence[Method], champion: Method, target: Path) -> None:
    """PSNR over speedup, in blocks and in time. The best few of each side in colour, peers dashed, all others grey."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    others = [method for method in _best_first(every) if method is not champion]
    coloured = [method for method in others if method.library != OURS][:4]
    coloured += [method for method in others if method.library == OURS][:4]
    _line(axes, champion, color=CHAMPION_COLOUR, marker="*", markersize=10, linewidth=2.4, zorder=10)
    for method, colour, marker in zip(coloured, COLOURS, MARKERS, strict=False):
        style = "solid" if method.library == OURS else "dashed"
        _line(axes, method, color=colour, marker=marker, markersize=4.5, linewidth=1.3, linestyle=style, zorder=5)
    label = "all others"
    for method in others:
        if method not in coloured:
            _line(axes, method, label, color=GREY, marker=".", markersize=3, linewidth=0.8)
            label = "_"  # once in the legend is enough
    for axis, title in zip(axes, ("fewer blocks computed", "faster denoising (wall clock)"), strict=True):
        axis.set_xscale("log")
        axis.set_xticks([1, 1.5, 2, 3, 4, 6, 8])
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(f"times {title}")
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("PSNR against the uncached image, dB")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files([target]) as (temporary,):
        figure.savefig(temporary, dpi=150)


def _line(axes: np.ndarray, method: Method, label: str | None = None, **look: object) -> None:
    points = method.frontier
    psnr = [point.psnr.mean() for point in points]
    axes[0].plot([point.speedup for point in points], psnr, label=label or method.label, **look)
    axes[1].plot([np.median(point.wall) for point in points], psnr, **look)
