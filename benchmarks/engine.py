"""What the engine itself costs: `python -m benchmarks.engine`, the results in `benchmarks/results/engine.md`.

On the embedded model, on a Flux, a Wan and a HunyuanVideo of middle size with random weights and, where there is a
GPU, on the shapes of FLUX.1-dev and Wan 1.3B (random weights, bfloat16, eager and with compiled blocks). Times are
medians of calls that take turns in one process:

- a method that never hits, against the untouched transformer;
- a step at which everything hits, against the work that is left: a transformer of the first blocks that the
  method runs, with the model's own embedders and head, adding each stage's residual, and for TeaCache the norm that it
  watches. It makes its rotary table at every step, as the model does; a cache makes Flux's once a run, so that it can
  be faster than this;
- diffusers' own first-block cache, measured in the same two ways;
- one decision and one forecast by themselves, against a step and against what the memory's bandwidth allows.
"""

import argparse
import platform
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor

import h2cache
from benchmarks import subjects
from benchmarks.clock import Timed, interleaved, seconds
from benchmarks.subjects import Loop, Subject
from h2cache import CacheConfig, H2CacheConfig
from h2cache.adapters import adapter_of
from h2cache.baselines import BlockCacheConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.eval.files import REPOSITORY
from h2cache.policy.forecasts import extrapolate
from h2cache.policy.pfs import observe

RESULTS = REPOSITORY / "benchmarks/results/engine.md"
NEVER, ALWAYS = -1.0, float("inf")
POLYNOMIAL = (1.0, 0.0)  # of TeaCache; which one it is costs nothing


def watched(subject: Subject, config: CacheConfig) -> Timed:
    """A step that probes, compares and remembers, while nothing hits."""
    loop = Loop(subject, subject.copy())
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
    transformer = subject.copy()
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
        "TeaCache": TeaCacheConfig(threshold=NEVER, coefficients=POLYNOMIAL),
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
        "TeaCache": (TeaCacheConfig(threshold=ALWAYS, coefficients=POLYNOMIAL), (0, 0)),
        "HiCache, stages": (HiCacheConfig(interval=10**9, granularity="stage"), (0, 0)),
    }
    for name, (config, blocks) in methods.items():
        residuals = len(config.compose())
        least = mandatory(subject, blocks, residuals, with_norm=name == "TeaCache")
        skipping = Loop(subject, subject.copy())
        with h2cache.apply(skipping.transformer, config) as handle:
            base, measured = interleaved([least, skipping.step], subject.repeats)
            decisions = handle.trace.to_pandas().decision.tail(subject.repeats)
        if not decisions.isin(["hit", "forced"]).all():
            raise RuntimeError("a step that was timed as a hit was computed")
        yield f"{name}, all hits", described(blocks, residuals, name == "TeaCache"), base, measured
    base, measured = interleaved([mandatory(subject, (1, 0), 1), hooked(subject, ALWAYS)], subject.repeats)
    yield "diffusers' FirstBlockCache, all hits", described((1, 0), 1), base, measured


def mandatory(subject: Subject, blocks: tuple[int, int], residuals: int, with_norm: bool = False) -> Timed:
    """The work that a method cannot avoid: embedders, head, its first blocks, its residuals, the norm that it watches.

    `blocks` are those of structure and of detail; a lone list has both.
    """
    transformer = subject.copy(blocks if len(subject.depths) == 2 else (sum(blocks),))
    loop = Loop(subject, transformer)
    streams = residual_streams(subject)
    forecast = partial(extrapolate, [streams], [1.0], base=streams)

    def step() -> float:
        return loop.step() + sum(seconds(forecast, subject.device) for _ in range(residuals))

    if not with_norm:
        return step
    adapter = adapter_of(subject.transformer)
    role, first = next((role, blocks[0]) for role, blocks in adapter.blocks(subject.transformer).items())
    arguments = {}

    def note(block: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        arguments.update(adapter.block_call(role, block).bind(args, kwargs))

    hook = first.register_forward_pre_hook(note, with_kwargs=True)
    Loop(subject).step()
    hook.remove()
    return lambda: step() + seconds(lambda: adapter.modulated(first, arguments), subject.device)


def described(blocks: tuple[int, int], residuals: int, with_norm: bool = False) -> str:
    parts = [f"first {sum(blocks)} block(s)"] * (sum(blocks) > 0) + ["first norm"] * with_norm
    return ", ".join([*parts, f"{residuals} residual(s)", "embedders and head"])


def residual_streams(subject: Subject) -> tuple[Tensor, ...]:
    """Random (1, tokens, D) of the image or video, and of the text where it is a stream."""
    width = subject.transformer.config.num_attention_heads * subject.transformer.config.attention_head_dim
    return tuple(
        torch.randn(1, tokens, width, device=subject.device, dtype=subject.transformer.dtype)
        for tokens in subject.tokens
        if tokens
    )


def parts(subject: Subject) -> Iterator[tuple[str, float, float]]:
    """(what, seconds, seconds that reading and writing its tensors once would take at the measured bandwidth)."""
    streams = residual_streams(subject)
    rate = bandwidth(subject.device)
    image_size, size = (sum(part.numel() * part.element_size() for part in parts) for parts in (streams[:1], streams))
    cases = {
        "decision, not pooled (Block Cache)": (streams[:1], None, 2 * image_size),
        "decision, pooled by 2 (structure)": (streams[:1], subject.tokens[0] // 2, 2 * image_size),
        "decision, pooled by 12 (detail)": (streams[::-1], sum(subject.tokens) // 12, 2 * size),
    }
    for name, (after, target, features) in cases.items():
        before = [part * 0.9 for part in after]
        reference, _ = observe(after, before, target, None)

        def decide(after=after, before=before, target=target, reference=reference) -> None:
            observe(after, before, target, reference)[1].tolist()

        (measured,) = interleaved([lambda decide=decide: seconds(decide, subject.device)], 10 * subject.repeats)
        yield name, measured, (features + 2 * reference.numel() * 4) / rate
    terms = [tuple(part * scale for part in streams) for scale in (0.1, 0.01)]
    forecast = partial(extrapolate, terms, [1.0, 0.5], base=streams)
    (measured,) = interleaved([lambda: seconds(forecast, subject.device)], 10 * subject.repeats)
    yield "forecast of one stage, order 1", measured, 4 * size / rate


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    (measured,) = interleaved([lambda: seconds(lambda: target.copy_(source), device)], 10)
    return 2 * source.numel() * source.element_size() / measured


def report(subject: Subject) -> list[str]:
    lines = [f"### {subject.name}, {' + '.join(str(count) for count in subject.tokens if count)} tokens", ""]
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
    parser.add_argument("--only", help="part of a subject's name, such as wan")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    makers = [subjects.flux_mini, subjects.mid_size_flux, subjects.mid_size_wan, subjects.mid_size_hunyuan_video]
    if torch.cuda.is_available():
        makers += [
            partial(make, compiled=compiled)
            for make in (subjects.flux1_dev, subjects.wan_1_3b)
            for compiled in (False, True)
        ]
    if options.only:
        makers = [make for make in makers if options.only in repr(make)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [
        f"`python -m benchmarks.engine --repeats {options.repeats} --threads {options.threads}`: "
        f"{platform.machine()} CPU, {gpu}, torch {torch.__version__}.",
        "",
    ]
    with torch.no_grad():  # as pipelines do
        for make in makers:
            lines += report(make(options.repeats))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
