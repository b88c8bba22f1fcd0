"""What the engine itself costs: `python -m benchmarks.engine`, the results in `benchmarks/results/engine.md`.

On the embedded model, on a mid-size Flux of random weights and, where there is a GPU, on FLUX.1-dev's shapes (random
weights, bfloat16, eager and with compiled blocks). Times are medians of calls that take turns in one process:

- a method that never hits, against the untouched transformer;
- a step at which everything hits, against the work that is left: a transformer of the first blocks that the
  method runs, with the model's own embedders and head, and for TeaCache the norm that it watches. It makes its rotary
  table at every step, as the model does; a cache makes it once a run, so that it can be faster than this;
- diffusers' own first-block cache, measured in the same two ways;
- one decision and one forecast by themselves, against a step and against what the memory's bandwidth allows.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel

import h2cache
from baselines import BlockCacheConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache import CacheConfig, H2CacheConfig
from h2cache.forecasts import extrapolate
from h2cache.pfs import observe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/engine.md"
NEVER, ALWAYS = -1.0, float("inf")
MID_SIZE = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 6, "attention_head_dim": 64}
Timed = Callable[[], float]


@dataclass(frozen=True)
class Subject:
    """A transformer, and the size of what it draws: `side` squared image tokens and `text_tokens`."""

    name: str
    transformer: FluxTransformer2DModel
    side: int
    text_tokens: int
    repeats: int

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def width(self) -> int:
        return self.transformer.inner_dim


class Loop:
    """An endless denoising run of one transformer: every call is one step later than the call before."""

    def __init__(self, subject: Subject, transformer: FluxTransformer2DModel | None = None):
        self.transformer = subject.transformer if transformer is None else transformer
        self.device = subject.device
        config, generator = self.transformer.config, torch.Generator().manual_seed(0)
        grid = torch.arange(subject.side).float()
        rows, columns = torch.meshgrid(grid, grid, indexing="ij")
        tokens = subject.side**2
        features = {
            "hidden_states": torch.randn(1, tokens, config.in_channels, generator=generator),
            "encoder_hidden_states": torch.randn(
                1, subject.text_tokens, config.joint_attention_dim, generator=generator
            ),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        }
        self.time = 1.0
        self.inputs = {name: value.to(self.device, self.transformer.dtype) for name, value in features.items()}
        self.inputs |= {
            "guidance": torch.full((1,), 3.5, device=self.device),
            "img_ids": torch.stack([torch.zeros(tokens), rows.flatten(), columns.flatten()], dim=-1).to(self.device),
            "txt_ids": torch.zeros(subject.text_tokens, 3, device=self.device),
        }

    def step(self) -> float:
        """Seconds of one call."""
        self.time -= 1e-6
        timestep = torch.full((1,), self.time, device=self.device, dtype=torch.float32)
        return seconds(lambda: self.transformer(timestep=timestep, **self.inputs), self.device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, from an idle device to an idle device."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def interleaved(cases: list[Timed], repeats: int) -> list[float]:
    """Median seconds of each, the calls taken in turns so that noise of the machine meets all alike."""
    for case in cases:
        for _ in range(5):
            case()
    samples = [[case() for case in cases] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def copy_of(transformer: FluxTransformer2DModel, **changes: int) -> FluxTransformer2DModel:
    """Another transformer with the same weights, not copied; `num_layers=`, `num_single_layers=`: only the first."""
    with torch.device("meta"):
        other = FluxTransformer2DModel.from_config(transformer.config, **changes)
    other.load_state_dict(transformer.state_dict(), strict=False, assign=True)
    return other.eval()


def watched(subject: Subject, config: CacheConfig) -> Timed:
    """A step that probes, compares and remembers, while nothing hits."""
    loop = Loop(subject, copy_of(subject.transformer))
    handle = h2cache.apply(loop.transformer, config)

    def step() -> float:
        taken = loop.step()
        if handle.summary()["computed_fraction"] < 1:
            raise RuntimeError("a step that was timed as computed was a hit")
        handle.trace.clear()
        return taken

    return step


def hooked(subject: Subject, threshold: float) -> Timed:
    """A step under diffusers' first-block cache, on a transformer of its own: its hooks stay behind when disabled."""
    transformer = copy_of(subject.transformer)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    loop = Loop(subject, transformer)

    def step() -> float:
        with transformer.cache_context("cond"):
            return loop.step()

    return step


def never_hit(subject: Subject) -> Iterator[tuple[str, str, float, float]]:
    """(case, against, seconds, seconds of the case): what watching costs."""
    methods = {
        "H2-Cache": H2CacheConfig(tau1=NEVER, tau2=NEVER),
        "Block Cache": BlockCacheConfig(threshold=NEVER),
        "TeaCache": TeaCacheConfig(threshold=NEVER),
        "TaylorSeer, stages": TaylorSeerConfig(interval=1, granularity="stage"),
        "TaylorSeer, modules": TaylorSeerConfig(interval=1),
    }
    cases = {name: watched(subject, config) for name, config in methods.items()}
    cases["diffusers' FirstBlockCache"] = hooked(subject, NEVER)
    for name, case in cases.items():
        base, measured = interleaved([Loop(subject).step, case], subject.repeats)
        yield f"{name}, never hits", "plain transformer", base, measured


def all_hit(subject: Subject) -> Iterator[tuple[str, str, float, float]]:
    """(case, against, seconds, seconds of the case): a step at which every stage is skipped."""
    methods = {
        "H2-Cache": (H2CacheConfig(tau1=ALWAYS, tau2=ALWAYS), (1, 1)),
        "Block Cache": (BlockCacheConfig(threshold=ALWAYS), (1, 0)),
        "TeaCache": (TeaCacheConfig(threshold=ALWAYS), (0, 0)),
        "HiCache, stages": (HiCacheConfig(interval=10**9, granularity="stage"), (0, 0)),
    }
    for name, (config, blocks) in methods.items():
        least = mandatory(subject, blocks, with_norm=name == "TeaCache")
        skipping = Loop(subject, copy_of(subject.transformer))
        with h2cache.apply(skipping.transformer, config) as handle:
            base, measured = interleaved([least, skipping.step], subject.repeats)
            decisions = handle.trace.to_pandas().decision.tail(subject.repeats)
        if not decisions.isin(["hit", "forced"]).all():
            raise RuntimeError("a step that was timed as a hit was computed")
        yield f"{name}, all hits", described(blocks, name == "TeaCache"), base, measured
    base, measured = interleaved([mandatory(subject, (1, 0)), hooked(subject, ALWAYS)], subject.repeats)
    yield "diffusers' FirstBlockCache, all hits", described((1, 0)), base, measured


def mandatory(subject: Subject, blocks: tuple[int, int], with_norm: bool = False) -> Timed:
    """The work that a method cannot avoid: embedders, head, its first blocks, the norm that it watches."""
    double, single = blocks
    loop = Loop(subject, copy_of(subject.transformer, num_layers=double, num_single_layers=single))
    if not with_norm:
        return loop.step
    norm = subject.transformer.transformer_blocks[0].norm1
    tokens = torch.randn(1, subject.side**2, subject.width, device=subject.device, dtype=loop.transformer.dtype)
    return lambda: loop.step() + seconds(lambda: norm(tokens, emb=tokens[:, 0]), subject.device)


def described(blocks: tuple[int, int], with_norm: bool = False) -> str:
    parts = [f"first {sum(blocks)} block(s)"] * (sum(blocks) > 0) + ["first norm"] * with_norm
    return ", ".join([*parts, "embedders and head"])


def parts(subject: Subject) -> Iterator[tuple[str, float, float]]:
    """(what, seconds, seconds that reading and writing its tensors once would take at the measured bandwidth)."""
    image, text = (
        torch.randn(1, tokens, subject.width, device=subject.device, dtype=subject.transformer.dtype)
        for tokens in (subject.side**2, subject.text_tokens)
    )
    rate = bandwidth(subject.device)
    size = (image.numel() + text.numel()) * image.element_size()
    joint = subject.side**2 + subject.text_tokens
    cases = {
        "decision, not pooled (Block Cache)": ((image,), None, 2 * image.numel() * image.element_size()),
        "decision, pooled by 2 (structure)": ((image,), subject.side**2 // 2, 2 * image.numel() * image.element_size()),
        "decision, pooled by 12 (detail)": ((text, image), joint // 12, 2 * size),
    }
    for name, (after, target, features) in cases.items():
        before = [part * 0.9 for part in after]
        reference, _ = observe(after, before, target, None)

        def decide(after=after, before=before, target=target, reference=reference) -> None:
            observe(after, before, target, reference)[1].tolist()

        (measured,) = interleaved([lambda decide=decide: seconds(decide, subject.device)], 10 * subject.repeats)
        yield name, measured, (features + 2 * reference.numel() * 4) / rate
    terms = [(image * 0.1, text * 0.1), (image * 0.01, text * 0.01)]
    forecast = partial(extrapolate, terms, [1.0, 0.5], base=(image, text))
    (measured,) = interleaved([lambda: seconds(forecast, subject.device)], 10 * subject.repeats)
    yield "forecast of one stage, order 1", measured, 4 * size / rate


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    (measured,) = interleaved([lambda: seconds(lambda: target.copy_(source), device)], 10)
    return 2 * source.numel() * source.element_size() / measured


def flux_mini(repeats: int) -> Subject:
    transformer = FluxTransformer2DModel.from_pretrained(ROOT / "assets/flux-mini", subfolder="transformer")
    return Subject("flux-mini, float32", transformer.float().eval(), 8, 40, repeats)


def mid_size(repeats: int) -> Subject:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        guidance_embeds=True, joint_attention_dim=512, pooled_projection_dim=256, axes_dims_rope=(8, 28, 28), **MID_SIZE
    )
    return Subject("mid-size Flux (384 wide, 4 + 8 blocks), float32", transformer.eval(), 16, 64, max(20, repeats // 5))


def flux1_dev(repeats: int, compiled: bool) -> Subject:
    """FLUX.1-dev at 1024x1024, its weights drawn at random where they will stay: they would take minutes on a CPU."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True).bfloat16()
    transformer = transformer.to_empty(device="cuda").eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if compiled:
        transformer.compile_repeated_blocks()
    name = f"FLUX.1-dev, bfloat16, {'compiled blocks' if compiled else 'eager'}"
    return Subject(name, transformer, 64, 512, max(10, repeats // 10))


def report(subject: Subject) -> list[str]:
    lines = [f"### {subject.name}, {subject.side**2} + {subject.text_tokens} tokens", ""]
    lines += ["| case | against | against, ms | case, ms | ratio |", "|---|---|---:|---:|---:|"]
    for case, against, base, measured in [*never_hit(subject), *all_hit(subject)]:
        lines.append(f"| {case} | {against} | {1e3 * base:.2f} | {1e3 * measured:.2f} | {measured / base:.3f} |")
    (step,) = interleaved([Loop(subject).step], subject.repeats)
    lines += ["", "| part | ms | of a step | at full memory bandwidth, ms |", "|---|---:|---:|---:|"]
    for name, measured, floor in parts(subject):
        lines.append(f"| {name} | {1e3 * measured:.3f} | {measured / step:.3%} | {1e3 * floor:.3f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subjects = [partial(flux_mini, options.repeats), partial(mid_size, options.repeats)]
    if torch.cuda.is_available():
        subjects += [partial(flux1_dev, options.repeats, compiled) for compiled in (False, True)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [
        f"`python -m benchmarks.engine --repeats {options.repeats} --threads {options.threads}`: "
        f"{platform.machine()} CPU, {gpu}, torch {torch.__version__}.",
        "",
    ]
    with torch.no_grad():  # as pipelines do
        for make in subjects:
            lines += report(make())
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
