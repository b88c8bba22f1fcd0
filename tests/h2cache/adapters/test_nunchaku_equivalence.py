"""On the same weights nunchaku's adapters decide and draw what the diffusers adapter does, method for method.

V1's stand-in computes with diffusers' own blocks, so its images are equal to the last bit. V2's splits a projection in
two, which rounds differently: in bfloat16 enough to tip a comparison that is close to its threshold. It is compared in
float32 (which its kernels would not have) and in float16.
"""
# ruff: noqa: F811 - fixtures

from typing import Any

import pytest
import torch
from loops import denoise
from methods_under_test import KINDS, never_hitting
from nunchakus import CLASSES, STAGED, Subject, flux, nunchaku, standin  # noqa: F401
from pictures import is_mixed, partial_steps, run_record
from thorough import named, product
from torch import Tensor

import h2cache
from h2cache import CacheConfig

every_method = pytest.mark.parametrize("config", STAGED)
kinds = pytest.mark.parametrize("config", [method for method in STAGED if method in KINDS])
generations = pytest.mark.parametrize("generation", CLASSES)
FIRST = STAGED[0].id  # runs everything; the other methods what tells most
DEPTHS = [pytest.param(*depth, id="{}-{}".format(*depth)) for depth in [(1, 4), (3, 1), (5, 2)]]
SAMPLES = [pytest.param(*numbers, id="{}-{}".format(*numbers)) for numbers in [(2, 3), (1, 2), (2, 0), (0, 1)]]
DTYPES = {"v1": torch.bfloat16, "v2": torch.float32}
TOLERANCE = {torch.bfloat16: 0.0, torch.float16: 0.01, torch.float32: 1e-4}


def cached(model: Any, config: CacheConfig, **options: Any) -> tuple[Tensor, list, h2cache.Handle]:
    """The image, and each decision with the numbers of blocks that it cost."""
    with h2cache.apply(model, config) as handle:
        image = denoise(model, **options)
    rows = [(r.context, r.step, r.sample, r.stage, r.decision, r.blocks_computed) for r in handle.trace]
    return image, rows, handle


def assert_alike(subject: Subject, image: Tensor, expected: Tensor) -> None:
    if subject.generation == "v1":
        assert torch.equal(image, expected)
    tolerance = TOLERANCE[subject.dtype]
    torch.testing.assert_close(image, expected, rtol=tolerance, atol=tolerance)


RUNS = {
    "plain": {},
    "batch": {"batch": 3},
    "odd": {"height": 5, "width": 7, "text_tokens": 11},  # 35 image tokens: nothing is a multiple of anything
    "two-tiles": {"height": 13, "width": 21, "text_tokens": 3},  # 273 image tokens: the second tile is mostly padding
}
EVERY_RUN = [
    pytest.param(generation, run, id=f"{generation}-{name}")
    for generation in CLASSES
    for name, run in RUNS.items()
    if generation == "v1" or "batch" not in run  # V2's kernels take one image at a time
]


@pytest.mark.parametrize(("generation", "run"), EVERY_RUN)
def test_without_a_cache(generation, run, nunchaku):
    model = flux(dtype=DTYPES[generation])
    subject = standin(nunchaku, generation, model)
    options = dict(dtype=model.dtype, steps=4) | run
    assert_alike(subject, denoise(subject.transformer, **options), denoise(model, **options))


@product(
    "config, generation, run",
    STAGED,
    EVERY_RUN,
    kept=lambda method, run: run in ("v1-batch", "v2-odd") or method == FIRST,
)
def test_decisions_and_images_are_those_of_diffusers(config, generation, run, nunchaku):
    model = flux(dtype=DTYPES[generation])
    subject = standin(nunchaku, generation, model)
    options = dict(dtype=model.dtype, steps=10) | run
    expected, decided, handle = cached(model, config, **options)
    image, rows, _ = cached(subject.transformer, config, **options)
    assert is_mixed(handle)
    assert rows == decided
    assert_alike(subject, image, expected)


@generations
@kinds
def test_in_float16(config, generation, nunchaku):
    model = flux(dtype=torch.float16)
    subject = standin(nunchaku, generation, model)
    expected, decided, _ = cached(model, config, dtype=torch.float16)
    image, rows, _ = cached(subject.transformer, config, dtype=torch.float16)
    assert rows == decided
    assert_alike(subject, image, expected)


@generations
@kinds
def test_with_weights_of_four_bits(config, generation, nunchaku):
    """The weights are another model's; the cache does not care."""
    model = flux(dtype=DTYPES[generation])
    four_bit = nunchaku.models.utils.quantized(model)
    assert not torch.equal(denoise(four_bit, dtype=model.dtype, steps=2), denoise(model, dtype=model.dtype, steps=2))
    subject = standin(nunchaku, generation, four_bit)
    expected, decided, _ = cached(four_bit, config, dtype=model.dtype)
    image, rows, _ = cached(subject.transformer, config, dtype=model.dtype)
    assert rows == decided
    assert_alike(subject, image, expected)


@product(
    "config, generation, double, single",
    [method for method in STAGED if method in KINDS],
    named(dict(zip(CLASSES, CLASSES, strict=True))),
    DEPTHS,
    kept=lambda method, generation, depth: method == FIRST or (generation, depth) == ("v1", "3-1"),
)
def test_any_number_of_blocks(generation, config, double, single, nunchaku):
    """Counted, not assumed: FLUX.1-lite has fewer, and a stage may have a first block only."""
    model = flux(double, single, dtype=DTYPES[generation])
    subject = standin(nunchaku, generation, model)
    expected, decided, _ = cached(model, config, dtype=model.dtype, steps=7)
    image, rows, handle = cached(subject.transformer, config, dtype=model.dtype, steps=7)
    assert run_record(handle).total_blocks == double + single
    assert rows == decided
    assert_alike(subject, image, expected)


# --- ControlNet -----------------------------------------------------------------------------------------------------


def with_samples(double: int, single: int) -> Any:
    """Adds lists of ControlNet samples to every call, other ones at every step."""

    def add(step: int, call: dict[str, Any]) -> None:
        batch, tokens, _ = call["hidden_states"].shape
        generator = torch.Generator().manual_seed(step)

        def samples(number: int) -> list[Tensor] | None:
            drawn = [torch.randn(1, tokens, 32, generator=generator) for _ in range(number)]
            return [(0.3 * sample).to(call["hidden_states"].dtype).repeat(batch, 1, 1) for sample in drawn] or None

        call["controlnet_block_samples"] = samples(double)
        call["controlnet_single_block_samples"] = samples(single)

    return add


@product(
    "config, double, single, batch",
    STAGED,
    SAMPLES,
    named({"1": 1, "3": 3}),
    kept=lambda method, samples, batch: (samples, batch) == ("2-3", "3") or (method == FIRST and batch == "1"),
)
def test_controlnet_on_v1_counts_once_hit_or_miss(config, double, single, batch, nunchaku):
    model = flux()
    subject = standin(nunchaku, "v1", model)
    options = dict(dtype=model.dtype, steps=8, batch=batch, before_step=with_samples(double, single))
    expected, decided, handle = cached(model, config, **options)
    image, rows, _ = cached(subject.transformer, config, **options)
    assert rows == decided and any(row.decision.skips for row in handle.trace)
    assert torch.equal(image, expected)


@pytest.mark.parametrize("batch", [1, 3])
@every_method
def test_controlnet_on_v1_without_hits_changes_no_bit(config, batch, nunchaku):
    """There the core adds the samples by itself; here they are added around its layers."""
    subject = standin(nunchaku, "v1", flux())
    options = dict(steps=3, batch=batch, before_step=with_samples(2, 2))
    untouched = subject.denoise(**options)
    with h2cache.apply(subject.transformer, never_hitting(config)):
        assert torch.equal(subject.denoise(**options), untouched)


@every_method
def test_controlnet_on_v2_is_refused_as_without_a_cache(config, nunchaku):
    """nunchaku's second generation has none yet, and says so; a cache must not swallow the samples."""
    subject = standin(nunchaku, "v2", flux())
    with pytest.raises(NotImplementedError, match="Controlnet"):
        subject.denoise(before_step=with_samples(2, 3))
    with h2cache.apply(subject.transformer, config) as handle:
        expected = subject.denoise()
        skipped = next(row.step for row in handle.trace if row.decision.skips)

        def late(step: int, call: dict[str, Any]) -> None:
            if step == skipped:
                with_samples(2, 3)(step, call)

        with pytest.raises(NotImplementedError, match="Controlnet"):
            subject.denoise(before_step=late)
        assert torch.equal(subject.denoise(), expected)


def test_partial_batches_are_among_those_above():
    model = flux()
    config = STAGED[0].values[0]
    *_, handle = cached(model, config, dtype=model.dtype, steps=10, batch=3)
    assert partial_steps(handle.trace) > 0
