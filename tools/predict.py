"""Predicts how long a model takes on a GPU that nobody here has: `python -m tools.predict --write docs/gpu.md`.

The time of one call of the denoiser is its floating-point operations over the share of the GPU's peak rate that is
reached, or the time to read its weights once, whichever is longer. PyTorch counts the operations on the model at its
real size, on the meta device, where tensors have shapes and no data. Nothing here is a measurement.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from h2cache.eval.experiments.settings import Setting
from h2cache.eval.experiments.study import Study, read_study
from h2cache.eval.files import CONFIGS
from h2cache.policy.rules import Interval, RuleState
from tools.coverage_matrix import inserted

MARKS = "<!-- tools.predict: begin -->", "<!-- tools.predict: end -->"
REACHED = 0.4  # the share of the peak rate that is reached: an assumption
PRODUCTS = {"aten.bmm"}  # the products of attention, which stay in 16 bits; all others are linear layers


@dataclass(frozen=True)
class Card:
    """A GPU, as its maker describes it.

    Fields:
        memory: GB.
        bfloat16: peak TFLOP/s of the tensor cores without sparsity, sums in float32.
        four_bits: the same in int4 (Blackwell: fp4); None where nunchaku has no kernels.
        bandwidth: of the memory, GB/s.
    """

    name: str
    memory: int
    bfloat16: float
    four_bits: float | None
    bandwidth: float


CARDS = (
    Card("RTX 3090", 24, 71, 568, 936),
    Card("RTX 4090", 24, 165.2, 1321, 1008),
    Card("RTX 5090", 32, 209.5, 1676, 1792),
    Card("A100 80 GB", 80, 312, 1248, 2039),
    Card("H100 SXM", 80, 989, None, 3350),
    Card("H200", 141, 989, None, 4800),
)


@dataclass(frozen=True)
class Work:
    """One call of a denoiser.

    Fields:
        linear, attention: floating-point operations, a multiply-add being two.
        weight_bytes: of the denoiser.
    """

    linear: float
    attention: float
    weight_bytes: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


@dataclass(frozen=True)
class Model:
    """A model of configs/model, and how its denoiser is made and called at full size.

    Fields:
        calls: of the denoiser in each step.
        text, vae: GB of the text encoders in bfloat16 and of the VAE, by the sizes on their model cards.
        denoisers: how many there are; each serves a part of the steps.
    """

    config: str
    label: str
    make: Callable[[], nn.Module]
    inputs: Callable[[Any, Any], dict[str, Any]]
    calls: int
    text: float
    vae: float
    denoisers: int = 1


def _flux(config: Any, call: Any, axes: int) -> dict[str, Any]:
    image, text = call.height * call.width // 256, 512
    return {
        "hidden_states": _half(1, image, config.in_channels),
        "encoder_hidden_states": _half(1, text, config.joint_attention_dim),
        "timestep": _half(1),
        "guidance": _half(1),
        "img_ids": torch.empty(image, axes),
        "txt_ids": torch.empty(text, axes),
    }


def _flux1(config: Any, call: Any) -> dict[str, Any]:
    return _flux(config, call, 3) | {"pooled_projections": _half(1, config.pooled_projection_dim)}


def _qwen(config: Any, call: Any) -> dict[str, Any]:
    rows, columns = call.height // 16, call.width // 16
    return {
        "hidden_states": _half(1, rows * columns, config.in_channels),
        "encoder_hidden_states": _half(1, 512, config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, 512, dtype=torch.bool),
        "timestep": _half(1),
        "img_shapes": [[(1, rows, columns)]],
    }


def _wan(config: Any, call: Any, scale: int) -> dict[str, Any]:
    frames, rows, columns = (call.num_frames - 1) // 4 + 1, call.height // scale, call.width // scale
    return {
        "hidden_states": _half(1, config.in_channels, frames, rows, columns),
        "encoder_hidden_states": _half(1, 512, config.text_dim),
        "timestep": torch.empty(1),
    }


def _wan_5b(config: Any, call: Any) -> dict[str, Any]:
    inputs = _wan(config, call, 16)
    _, _, frames, rows, columns = inputs["hidden_states"].shape
    return inputs | {"timestep": torch.empty(1, frames * rows * columns // 4)}  # one for each token


def _half(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


# A class of diffusers without arguments is the size that its authors published; the 5B model is the exception.
WAN_5B = {
    "in_channels": 48,
    "out_channels": 48,
    "num_layers": 30,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
}
MODELS = (
    Model(
        "flux1-dev",
        "FLUX.1-dev",
        partial(diffusers.FluxTransformer2DModel, guidance_embeds=True),
        _flux1,
        calls=1,
        text=9.8,  # T5 XXL's encoder and CLIP L
        vae=0.2,
    ),
    Model(
        "flux2-dev",
        "FLUX.2-dev",
        diffusers.Flux2Transformer2DModel,
        partial(_flux, axes=4),
        calls=1,
        text=48.0,  # Mistral Small 3.2 24B
        vae=0.2,
    ),
    Model(
        "qwen-image",
        "Qwen-Image",
        diffusers.QwenImageTransformer2DModel,
        _qwen,
        calls=2,
        text=16.6,  # Qwen2.5 VL 7B
        vae=0.3,
    ),
    Model(
        "wan2.2-ti2v-5b",
        "Wan 2.2 5B",
        partial(diffusers.WanTransformer3DModel, **WAN_5B),
        _wan_5b,
        calls=2,
        text=11.4,  # UMT5 XXL's encoder
        vae=2.8,  # in float32
    ),
    Model(
        "wan2.2-t2v-a14b",
        "Wan 2.2 A14B",
        diffusers.WanTransformer3DModel,
        partial(_wan, scale=8),
        calls=2,
        text=11.4,  # UMT5 XXL's encoder
        vae=0.5,  # in float32
        denoisers=2,
    ),
)


@cache
def work(model: Model) -> Work:
    """Of one call at the size that the model's configuration asks for."""
    with torch.device("meta"):
        denoiser = model.make().bfloat16().eval()
        inputs = model.inputs(denoiser.config, call_of(model))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(**inputs)
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for operator, count in counts.items() if operator in PRODUCTS)
    weights = sum(parameter.numel() for parameter in denoiser.parameters()) * 2
    return Work(sum(counts.values()) - attention, attention, weights)


def call_of(model: Model) -> Any:
    """The fields of configs/model that say how the pipeline is called."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return _run(model.config, "none").model


def seconds_of_call(work: Work, card: Card, four_bits: bool = False) -> float:
    """Of one call of the denoiser; NaN where the card has no 4-bit kernels.

    Args:
        four_bits: linear layers and their weights in 4 bits, attention in 16.
    """
    if four_bits and card.four_bits is None:
        return math.nan
    rate = card.four_bits if four_bits else card.bfloat16
    computing = (work.linear / rate + work.attention / card.bfloat16) / (REACHED * 1e12)
    reading = work.weight_bytes * (0.25 if four_bits else 1) / (card.bandwidth * 1e9)
    return max(computing, reading)


def computed_steps(steps: int, interval: int, first_enhance: int = 3) -> int:
    """How many of `steps` TaylorSeer, HiCache and ClusCa compute: the engine's own rule, asked step by step."""
    rule, since, computed = Interval(interval, first_enhance), 0, 0
    for step in range(steps):
        skips = rule.without_measuring(RuleState(consecutive_hits=since), step, False).skips
        since, computed = (since + 1, computed) if skips else (0, computed + 1)
    return computed


def most_evaluations(study: Study) -> int:
    """Of the denoiser for one prompt of the study's only experiment, if no threshold were ever met."""
    (experiment,) = study.experiments
    return sum(_most(setting, setting.steps or experiment.steps) for setting in experiment.settings)


def _most(setting: Setting, steps: int) -> int:
    interval = getattr(setting.config, "interval", None)
    return steps if interval is None else computed_steps(steps, interval, setting.config.first_enhance)


def paper_table(model: str) -> Study:
    """The experiment `table1` as `python -m eval` reads it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("eval", overrides=[f"model={model}", "experiment=table1"])
        return read_study(cfg, model, lambda name: _run(model, name).method)


def _run(model: str, method: str) -> Any:
    """What configs/run.yaml says with these."""
    return compose("run", overrides=[f"model={model}", f"method={method}"])


def tables() -> str:
    """What docs/gpu.md has between its marks."""
    return "\n\n".join(
        [
            "Memory for the weights in bfloat16. Denoisers are counted, the other parts are as their model cards say:",
            _markdown(_memory()),
            f"**Predicted** time of denoising one image or video **without a cache**, u = {REACHED:g}:",
            _markdown(_times()),
            "Steps that a schedule computes:",
            _markdown(_schedules()),
            *_hours(),
        ]
    )


def _memory() -> Iterator[Sequence[str]]:
    yield "model", "denoiser, GB", "text encoders, GB", "all parts, GB", "largest part, GB"
    for model in MODELS:
        weights = work(model).weight_bytes / 1e9
        name = f"{model.label}" + (f" ({model.denoisers} denoisers)" if model.denoisers > 1 else "")
        total = weights * model.denoisers + model.text + model.vae
        yield name, f"{weights:.1f}", f"{model.text:.1f}", f"{total:.0f}", f"{max(weights, model.text):.1f}"


def _times() -> Iterator[Sequence[str]]:
    yield "model", "size, steps", "TFLOP a call", *(card.name for card in CARDS)
    for model in MODELS:
        for four_bits in (False, True) if model.config == "flux1-dev" else (False,):
            call, one = call_of(model), work(model)
            frames = f"x{call.num_frames}" if "num_frames" in call else ""
            size = f"{call.width}x{call.height}{frames}, {call.num_inference_steps}"
            size += " x 2 calls" if model.calls == 2 else ""
            label = f"{model.label}, nunchaku" if four_bits else model.label
            calls = call.num_inference_steps * model.calls
            cells = (_time(one, card, calls, four_bits) for card in CARDS)
            yield label, size, f"{one.total / 1e12:,.0f}", *cells


def _time(one: Work, card: Card, calls: int, four_bits: bool) -> str:
    if one.weight_bytes * (0.25 if four_bits else 1) > card.memory * 1e9:
        return "too large"
    seconds = seconds_of_call(one, card, four_bits) * calls
    if math.isnan(seconds):
        return "no kernels"
    return _duration(seconds)


def _duration(seconds: float) -> str:
    if seconds < 200:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _schedules() -> Iterator[Sequence[str]]:
    intervals = (3, 4, 5, 6, 7)
    yield "of the steps", *(f"interval {interval}" for interval in intervals)
    for steps in (28, 50, 100):
        yield str(steps), *(str(computed_steps(steps, interval)) for interval in intervals)


def _hours() -> Iterator[str]:
    counts = (1, 4, 8, 16, 64)
    study = paper_table("flux1-dev")
    (experiment,) = study.experiments
    prompts, evaluations = len(study.prompts[experiment.prompts]), most_evaluations(study)
    yield (
        f"**Predicted** time of the paper's table on that many cards, at most (`experiment=table1`, FLUX.1-dev in "
        f"bfloat16: {prompts} prompts, {len(experiment.settings)} settings, {evaluations:,} evaluations a prompt if no "
        "threshold is ever met):"
    )
    model = next(model for model in MODELS if model.config == "flux1-dev")
    rows = [("cards", *(f"{card.name}" for card in CARDS))]
    for count in counts:
        seconds = (seconds_of_call(work(model), card) * evaluations * prompts / count for card in CARDS)
        rows.append((str(count), *map(_duration, seconds)))
    yield _markdown(rows)


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    header, *others = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into a page")
    page = parser.parse_args().write
    made = tables()
    if page is None:
        print(made)
    else:
        page.write_text(inserted(page.read_text(encoding="utf-8"), made, MARKS), encoding="utf-8")


if __name__ == "__main__":
    main()
