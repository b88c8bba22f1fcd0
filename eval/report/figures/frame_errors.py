"""Where the error of a cached video grows: each latent frame at each denoising step."""

from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from h2cache.eval.generation.video_latents import frame_errors, recorded_latents
from h2cache.eval.models.pipelines import load_pipeline
from h2cache.eval.report.figures.gaussianity import PLAIN
from h2cache.eval.report.figures.heatmap import COLOURS
from h2cache.eval.report.figures.output import Drawn, FigureOutput, select
from h2cache.eval.report.figures.style import PAGE
from h2cache.eval.report.results import Results

PANEL = 0.85  # inches of height
DECADES = 3  # of the scale of colours, at most


@dataclass(frozen=True, kw_only=True)
class FrameErrors(FigureOutput):
    """A panel for each of `settings` (none given: all with a cache and without a solver of their own).

    Error: relative L2 distance of a latent frame from that of the uncached run after the same step, the mean over the
    first `count` prompts, which are drawn again for it. None where latents have no axis of frames.
    """

    name: str = "frame_errors"
    title: str = "Error of each frame, step by step"
    settings: tuple[str, ...] = ()
    count: int = 2

    def draw(self, results: Results) -> Drawn | None:
        runs = results.baseline.reset_index().head(self.count)
        names = [name for name in select(results, "setting", self.settings) if results.methods.get(name) is not None]
        if runs.empty or not names or results.model_config is None:
            return None
        pipe = load_pipeline(results.model_config)
        errors: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for _, run in runs.iterrows():
            asked = (results.prompt_of(run), int(run["seed"]), int(run["steps"]))
            uncached = recorded_latents(pipe, results.model_config, *asked, None)
            if uncached is None:
                return None
            for name in names:
                cached = recorded_latents(pipe, results.model_config, *asked, results.methods[name])
                errors[name].append(frame_errors(cached, uncached).numpy())
        means = {name: np.mean(each, axis=0) for name, each in errors.items()}
        return Drawn(_figure(means), f"{_sentence(means)} {self._shown(len(runs))}")

    def _shown(self, prompts: int) -> str:
        return (
            "Relative L2 distance of each latent frame from that of the video without a cache, after each step; mean "
            f"over {prompts} prompt{'s' * (prompts != 1)}."
        )


def _figure(means: dict[str, np.ndarray]) -> Figure:
    highest = max(float(each.max()) for each in means.values()) or 1.0
    lowest = max(10**-DECADES * highest, min(float(each[each > 0].min(initial=highest)) for each in means.values()))
    scale = LogNorm(min(lowest, highest / 2), highest, clip=True)
    figure = Figure(figsize=(PAGE, PANEL * len(means) + 0.4), layout="constrained")
    axes = figure.subplots(len(means), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, values) in zip(axes, means.items(), strict=True):
        steps, frames = values.shape
        extent = (0.5, steps + 0.5, frames + 0.5, 0.5)
        shown = ax.imshow(values.T.clip(scale.vmin), norm=scale, cmap=COLOURS, aspect="auto", extent=extent)
        ax.set_title(name, loc="left")
        ax.set_yticks(range(1, frames + 1))
    axes[-1].set_xlabel("denoising step")
    figure.supylabel("latent frame", size=8)
    bar = figure.colorbar(shown, ax=list(axes), label="relative error", ticks=LogLocator(subs=(1, 2, 5)), format=PLAIN)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return figure


def _sentence(means: dict[str, np.ndarray]) -> str:
    """How large the error is at the end, and which frames have most of it."""
    last = {name: values[-1] for name, values in means.items()}
    sizes = "; ".join(f"{each.mean():.3g} with {name}" for name, each in last.items())
    uneven = {name: each.max() / each.min() for name, each in last.items() if each.min() > 0}
    worst = [int(each.argmax()) + 1 for each in last.values()]
    place = f"frame {worst[0]} in every panel" if len(set(worst)) == 1 else f"frames {', '.join(map(str, worst))}"
    words = f"After the last step the error of a frame is in the mean: {sizes}; it is largest in {place}"
    if not uneven:
        return words + "."
    return f"{words}, {min(uneven.values()):.2f} to {max(uneven.values()):.2f} times that of the best frame."
