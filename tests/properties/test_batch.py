"""Rule 4: image k of a batch is decided, computed and filled as if it were alone, and only what misses is computed."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from loops import attentions, blocks_of, denoise, executions
from methods_under_test import EARLY, FIRST_BLOCK, MEASURING, METHODS, SCHEDULED, every_method, measures, warmup_steps
from pictures import is_mixed, partial_steps, picture
from torch import Tensor, nn

import h2cache
from h2cache import CacheConfig, Decision, H2CacheConfig, Handle

every_measuring_method = pytest.mark.parametrize("config", MEASURING)
every_schedule = pytest.mark.parametrize("config", SCHEDULED)
BATCH = 4


@pytest.fixture
def exact(transformer) -> nn.Module:
    """The tiny transformer in float64: a batched matrix product then differs from single ones by nothing that shows."""
    return transformer.double()


def decided(handle: Handle, sample: int) -> list[tuple]:
    return [(row.step, row.stage, row.decision, row.blocks_computed) for row in handle.trace if row.sample == sample]


@every_method
def test_every_image_is_as_if_alone(config, exact):
    options = dict(dtype=torch.float64, steps=20)
    with h2cache.apply(exact, config) as together:
        images = denoise(exact, batch=BATCH, **options)
    assert is_mixed(together) and splits_as_it_should(config, together, at_least=5)
    for sample in range(BATCH):
        with h2cache.apply(exact, config) as handle:
            image = denoise(exact, seed=sample, **options)
        assert decided(together, sample) == decided(handle, 0)
        differences = [(a.diff, b.diff) for a, b in zip(by_sample(together, sample), handle.trace, strict=True)]
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in differences if b is not None)
        torch.testing.assert_close(images[sample], image[0], rtol=1e-9, atol=1e-9)


def splits_as_it_should(config: CacheConfig, handle: Handle, at_least: int) -> bool:
    """Whether some samples were skipped beside others that were not; by a schedule never."""
    return partial_steps(handle.trace) >= at_least if measures(config) else partial_steps(handle.trace) == 0


def by_sample(handle: Handle, sample: int) -> list:
    return [row for row in handle.trace if row.sample == sample]


@every_method
def test_only_what_misses_is_computed(config, transformer):
    """Samples that each block is computed for, call by call, against what the record says."""
    with h2cache.apply(transformer, config) as handle, attentions(transformer) as calls:
        denoise(transformer, batch=BATCH, steps=20)
    assert splits_as_it_should(config, handle, at_least=5)
    sizes = {"structure": 2, "detail": 3}
    for step, rows_through in enumerate(calls):
        expected = []
        for stage in config.compose():
            decisions = [row.decision for row in handle.trace if row.step == step and row.stage == stage.name]
            misses = sum(not decision.skips for decision in decisions)
            blocks = sum(sizes[role] for role in stage.roles)
            expected += [BATCH if stage.runs_first_block else misses] + [misses] * (blocks - 1)
        assert rows_through == expected, step
    blocks = sum(row.blocks_computed for row in handle.trace)
    assert blocks == sum(map(sum, calls))
    assert handle.summary()["computed_fraction"] == pytest.approx(blocks / (20 * BATCH * 5))


@pytest.mark.parametrize("config", EARLY)
def test_what_misses_is_looked_at_by_itself(config, transformer):
    """A probe that needs no block runs the first block's norm once more for each sample, and nothing else."""
    with h2cache.apply(transformer, config) as handle, executions(transformer) as calls:
        denoise(transformer, batch=BATCH, steps=20)
    misses = [sum(not row.decision.skips for row in handle.trace if row.step == step) for step in range(20)]
    assert calls == [[BATCH + count, count, count, count, count] for count in misses]


@every_method
def test_pictures_of_one_call(config, tiny_pipe):
    """A list of prompts through the pipeline, each with its generator."""
    prompts = ["a red stop sign", "a blue shirt", "a label that says so"]
    tiny_pipe.transformer.double()
    try:
        cast = dict(steps=11, joint_attention_kwargs={})
        with h2cache.apply(tiny_pipe, config) as handle, doubled(tiny_pipe.transformer):
            together = picture(tiny_pipe, prompts, seed=4, **cast)
            assert is_mixed(handle) and splits_as_it_should(config, handle, at_least=1)
            for number, prompt in enumerate(prompts):
                single = picture(tiny_pipe, prompt, seed=4 + number, **cast)
                torch.testing.assert_close(together[number], single[0], rtol=1e-4, atol=1e-4)
    finally:
        tiny_pipe.transformer.float()


@every_method
def test_several_images_of_one_prompt(config, tiny_pipe):
    tiny_pipe.transformer.double()
    try:
        with h2cache.apply(tiny_pipe, config) as handle, doubled(tiny_pipe.transformer):
            together = picture(tiny_pipe, "a label", seed=2, steps=12, num_images_per_prompt=4)
            assert is_mixed(handle)
            for number in range(4):
                single = picture(tiny_pipe, "a label", seed=2 + number, steps=12)
                torch.testing.assert_close(together[number], single[0], rtol=1e-4, atol=1e-4)
    finally:
        tiny_pipe.transformer.float()


class doubled:
    """Lets a float32 pipeline call a float64 transformer, so that batching does not round."""

    def __init__(self, transformer: nn.Module):
        self.hooks = [
            transformer.register_forward_pre_hook(self.widen, with_kwargs=True),
            transformer.register_forward_hook(lambda module, args, output: (output[0].float(),)),
        ]

    @staticmethod
    def widen(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        floats = ("hidden_states", "encoder_hidden_states", "pooled_projections", "guidance")
        return args, {name: value.double() if name in floats else value for name, value in kwargs.items()}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


# --- the published behaviour ----------------------------------------------------------------------------------------


def pooled(residual: Tensor, target: int | None) -> Tensor:
    stride = 1 if target is None else max(1, residual.shape[1] // target)
    return F.avg_pool2d(residual.float().unsqueeze(1), stride, stride)


def first_residuals(transformer: nn.Module) -> tuple[list[Tensor], object]:
    """What the first block adds to the image tokens of the whole batch, at every call; and the hook that watches."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        seen.append(output[1] - kwargs["hidden_states"])

    return seen, blocks_of(transformer)[0].register_forward_hook(watch, with_kwargs=True)


@pytest.mark.parametrize("config", FIRST_BLOCK)
def test_mean_decides_once_for_the_whole_batch(config, transformer):
    """As the published code: relL1 is taken over the batch as one tensor."""
    config = config.updated(batch_decision="mean")
    residuals, hook = first_residuals(transformer)
    with h2cache.apply(transformer, config) as handle:
        denoise(transformer, batch=BATCH, steps=20)
    hook.remove()
    assert is_mixed(handle) and partial_steps(handle.trace) == 0

    stage = config.compose()[0]
    threshold = config.tau1 if isinstance(config, H2CacheConfig) else config.threshold
    target = config.pool1 if isinstance(config, H2CacheConfig) else None
    reference = None
    for step, residual in enumerate(residuals):
        probe = pooled(residual, target)
        rows = [row for row in handle.trace if row.step == step and row.stage == stage.name]
        assert len(rows) == BATCH
        if step < warmup_steps(config):
            assert {row.decision for row in rows} == {Decision.WARMUP}
            reference = probe
            continue
        difference = ((reference - probe).abs().mean() / reference.abs().mean()).item()
        assert [row.diff for row in rows] == [pytest.approx(difference, rel=1e-5)] * BATCH
        hit = difference < threshold
        assert {row.decision for row in rows} == {Decision.HIT if hit else Decision.COMPUTE}, step
        if not hit:
            reference = probe


@pytest.mark.parametrize("config", EARLY)
def test_mean_of_what_is_seen_before_the_blocks(config, transformer):
    """The same where the first block's input is watched, from each step to the next: the changes add up until the
    batch computes. The last step computes whatever they are."""
    config = config.updated(batch_decision="mean")
    assert config.coefficients == (1.0, 0.0), "the reference below adds up the changes as they are"
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        with torch.no_grad():
            seen.append(module.norm1.forward(kwargs["hidden_states"], emb=kwargs["temb"])[0])

    inputs: list[dict] = []
    with h2cache.apply(transformer, config) as handle:
        hook = transformer.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True
        )
        denoise(transformer, batch=BATCH, steps=20)
        hook.remove()
    hook = transformer.transformer_blocks[0].register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        for call in inputs:
            transformer(**call)
    hook.remove()
    assert is_mixed(handle) and partial_steps(handle.trace) == 0
    total = 0.0
    for step in range(1, 20):
        total += ((seen[step - 1] - seen[step]).abs().mean() / seen[step - 1].abs().mean()).item()
        rows = [row for row in handle.trace if row.step == step]
        assert [row.diff for row in rows] == [pytest.approx(total, rel=1e-5)] * BATCH
        hit = total < config.threshold and step < 19
        assert {row.decision for row in rows} == {Decision.HIT if hit else Decision.COMPUTE}, step
        total = total if hit else 0.0


@every_schedule
def test_a_schedule_decides_once_for_the_whole_batch(config, transformer):
    """So that the mean over the batch changes nothing."""
    images = []
    for decision in ("sample", "mean"):
        with h2cache.apply(transformer, config.updated(batch_decision=decision)) as handle:
            images.append(denoise(transformer, batch=BATCH, steps=10))
        assert is_mixed(handle) and partial_steps(handle.trace) == 0
        assert all(decided(handle, sample) == decided(handle, 0) for sample in range(BATCH))
    assert torch.equal(*images)


@every_method
def test_mean_and_sample_agree_on_a_single_image(config, transformer):
    results = {}
    for decision in ("sample", "mean"):
        with h2cache.apply(transformer, config.updated(batch_decision=decision)) as handle:
            results[decision] = denoise(transformer), decided(handle, 0)
    assert torch.equal(results["sample"][0], results["mean"][0])
    assert results["sample"][1] == results["mean"][1]


@every_method
def test_mean_computes_all_or_none(config, transformer):
    config = config.updated(batch_decision="mean")
    with h2cache.apply(transformer, config), attentions(transformer) as calls:
        denoise(transformer, batch=BATCH, steps=12)
    assert {rows for call in calls for rows in call} == {0, BATCH}


@every_method
def test_a_sample_that_never_hits_among_others(config, exact):
    """One image is fresh noise at every step and (nearly) always misses; its neighbours go on skipping. A schedule
    skips all three, and no noise comes into the neighbours' forecasts."""

    def shake(step: int, call: dict) -> None:
        call["hidden_states"] = call["hidden_states"].clone()
        call["hidden_states"][1] = 3 * torch.randn(16, 16, generator=torch.Generator().manual_seed(step))

    options = dict(dtype=torch.float64, steps=12)
    with h2cache.apply(exact, config) as handle:
        together = denoise(exact, batch=3, before_step=shake, **options)
        rows = list(handle.trace)
        for sample in (0, 2):
            torch.testing.assert_close(
                together[sample], denoise(exact, seed=sample, **options)[0], rtol=1e-9, atol=1e-9
            )
    first = config.compose()[0].name
    skipped = [sum(row.decision.skips for row in rows if row.stage == first and row.sample == k) for k in range(3)]
    if measures(config):
        assert skipped[0] > skipped[1] < skipped[2]
    else:
        assert skipped[0] == skipped[1] == skipped[2] > 0


def test_samples_do_miss_at_different_steps(transformer):
    """What the tests above rely on."""
    config: CacheConfig = METHODS[0].values[0]
    with h2cache.apply(transformer, config) as handle:
        denoise(transformer, batch=BATCH, steps=12)
    patterns = [tuple(decision.skips for _, _, decision, _ in decided(handle, sample)) for sample in range(BATCH)]
    assert all(a != b for a, b in pairwise(patterns))
