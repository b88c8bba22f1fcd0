"""Rule 8: a method holds what its docstring says, in tensors of stated shape, and frees it when the run ends."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from loops import denoise, denoising
from methods_under_test import METHODS, SCHEDULED, every_method, measures
from pictures import is_mixed, own_pipeline, picture
from thorough import named, product
from tiny import tiny_transformer
from torch import nn
from waits import hide_timesteps

import h2cache
from h2cache import CacheConfig, H2CacheConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.policy.stages import ModuleStage, Stage
from h2cache.trace import KEPT_RUNS

WIDTH, HEAD_DIM, CHANNELS, DOUBLE, SINGLE = 32, 16, 16, 2, 3  # of the tiny transformer


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """Sets aside what exists, a million objects of libraries, so that counting and collecting see only what comes."""
    gc.collect()
    gc.freeze()


def documented_bytes(config: CacheConfig, rows: list, image: int, text: int, dtype: torch.dtype) -> int:
    """What the docstrings of the configs promise, for one run: `rows` of its trace, `image` and `text` tokens.

    Per sample, branch and stage: features in the model's dtype, `order + 1` times when forecasting (one more with every
    computed step at which differences are taken, until then), and the reference in float32, pooled where the method
    pools. With clusters also a label (int64) for each token and the centroids (float32) of both streams.

    And for each branch the sines and cosines of the positions, two (N+M, head_dim), float32.
    """
    stages = {stage.name: stage for stage in config.compose()}
    computed: dict[tuple, list[int]] = {}
    for row in rows:
        steps = computed.setdefault((row.context, row.sample, row.stage), [])
        if not row.decision.skips:
            steps.append(row.step)
    total = 0
    for (_, _, name), steps in computed.items():
        stage = stages[name]
        differences = sum(step >= stage.forecast.first_difference for step in steps[1:])
        terms = 1 + min(stage.forecast.order, differences)
        total += terms * features(stage) * (image + text) * WIDTH * dtype.itemsize
        total += reference_bytes(config, stage, image, text)
        if getattr(stage, "clusters", None) is not None:
            total += (image + text) * 8 + 2 * config.clusters * WIDTH * 4
    branches = {row.context for row in rows}
    return total + len(branches) * 2 * (image + text) * HEAD_DIM * 4


def features(stage: Stage) -> int:
    """Tensors (N, D) and (M, D) at each order: a residual, or the outputs of attention and MLP in each block."""
    of_modules = {"structure": 2 * DOUBLE, "detail": SINGLE}
    return sum(of_modules[role] for role in stage.roles) if isinstance(stage, ModuleStage) else 1


def reference_bytes(config: CacheConfig, stage: Stage, image: int, text: int) -> int:
    if stage.probe is None:
        return 0
    tokens = image + text if stage.name == "detail" else image
    target = {"structure": "pool1", "detail": "pool2"}.get(stage.name)
    target = getattr(config, target) if target else None
    stride = max(1, tokens // target) if target else 1
    return (tokens // stride) * (WIDTH // stride) * 4


def live_bytes() -> int:
    """Bytes in all tensors that Python has made since `few_objects`, a shared storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# --- during a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@every_method
def test_bytes_at_every_step(config, batch, dtype, transformer):
    """To the byte, also where a part of the batch is computed again."""
    transformer.to(dtype)
    with h2cache.apply(transformer, config) as handle:
        assert handle.held_bytes() == 0
        for _ in denoising(transformer, batch=batch, dtype=dtype, steps=11):
            assert handle.held_bytes() == documented_bytes(config, list(handle.trace), image=16, text=6, dtype=dtype)
        assert is_mixed(handle)
        assert handle.held_bytes() == 0


@pytest.mark.parametrize(
    "config",
    [
        H2CacheConfig(tau1=0.3, tau2=0.35, forecast="taylor", order=3),
        H2CacheConfig(tau1=0.3, tau2=0.35, stages="structure"),
        H2CacheConfig(tau1=0.3, tau2=0.35, stages="detail", pool2=None),
        H2CacheConfig(tau1=-1, tau2=-1, pool1=None, pool2=None, forecast="hermite", order=2),
        H2CacheConfig(tau1=1e9, tau2=1e9, max_consecutive_hits=2, forecast="taylor", order=2),
        BlockCacheConfig(threshold=1e9),
        TeaCacheConfig(threshold=1e9, num_steps=12),
        TaylorSeerConfig(interval=2, order=0, first_enhance=1),
        TaylorSeerConfig(interval=2, order=3, first_enhance=1, granularity="stage"),
        HiCacheConfig(interval=2, order=3, first_enhance=4),
        HiCacheConfig(interval=2, sigma="auto"),
        ClusCaConfig(interval=4, order=2, clusters=6, forecast="hermite"),
    ],
    ids=str,
)
def test_bytes_of_other_compositions(config, transformer):
    with h2cache.apply(transformer, config) as handle:
        for _ in denoising(transformer, batch=2, steps=12):
            assert handle.held_bytes() == documented_bytes(config, list(handle.trace), 16, 6, torch.float32)


@every_method
def test_bytes_of_both_branches_in_a_pipeline(config, tiny_pipe):
    held = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        expected = documented_bytes(config, list(handle.trace), image=16, text=24, dtype=torch.float32)
        held.append((handle.held_bytes(), expected))
        return tensors

    with h2cache.apply(tiny_pipe, config) as handle:
        prompts = ["a red stop sign", "a label"]
        picture(tiny_pipe, prompts, negative_prompt="blurry", true_cfg_scale=2.0, callback_on_step_end=look)
        assert len(held) == 8 and all(is_held == expected for is_held, expected in held)
        assert handle.held_bytes() == 0


@every_method
def test_nothing_is_held_besides(config, transformer):
    """The interpreter's own count of tensors grows by what the handle says, not by a byte more.

    After a step that skips or compares. After one that only computes, a forecast that fits itself has something to
    learn from: (order + 2)^2 numbers a sample and stage."""
    plain, cached = denoising(transformer, batch=3, steps=14), denoising(transformer, batch=3, steps=14)
    with h2cache.apply(transformer, config) as handle:
        handle.remove()
        gc.collect()
        empty = live_bytes()
        loop = [next(plain) for _ in range(10)][-1:]
        of_loop = live_bytes() - empty
        plain.close()
        del loop
        gc.collect()
    with h2cache.apply(transformer, config) as handle:
        assert live_bytes() == empty
        loop = [next(cached) for _ in range(10)][-1:]
        assert live_bytes() - empty - of_loop == handle.held_bytes() > 0
        cached.close()
        del loop
        assert live_bytes() == empty


def test_flux_dev_in_the_docstrings():
    """The megabytes that the docstrings name, at 4096 image and 512 text tokens of width 3072, 19 double and 38 single
    blocks, bfloat16."""

    def said(config: type) -> str:
        return " ".join(config.__doc__.split())

    residual = (4096 + 512) * 3072 * 2
    references = 2048 * 1536 * 4 + 384 * 256 * 4
    input_ = 4096 * 3072 * 4
    stages, modules = 2 * residual, (2 * 19 + 38) * residual
    clusters = (4096 + 512) * 8 + 2 * 16 * 3072 * 4
    assert f"{2 * residual / 1e6:.0f} MB, and {references / 1e6:.0f} MB of references" in said(H2CacheConfig)
    assert f"{residual / 1e6:.0f} MB and {input_ / 1e6:.0f} MB" in said(BlockCacheConfig)
    assert f"{residual / 1e6:.0f} MB and {input_ / 1e6:.0f} MB" in said(TeaCacheConfig)
    assert f"order 1: {2 * stages / 1e6:.0f} MB, and {2 * modules / 1e9:.1f} GB" in said(TaylorSeerConfig)
    assert f"order 1: {2 * modules / 1e9:.1f} GB and half a megabyte" in said(ClusCaConfig) and 0.4e6 < clusters < 0.6e6


# --- after it -------------------------------------------------------------------------------------------------------


class Interruption(Exception):
    """Raised in the middle of a run."""


def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 5:
        raise Interruption
    return tensors


@every_method
def test_a_run_that_breaks_off_between_steps_is_freed(config, tiny_pipe):
    """As soon as its frames are: an exception that is kept keeps them."""
    with h2cache.apply(tiny_pipe, config) as handle:
        with pytest.raises(Interruption) as caught:
            picture(tiny_pipe, callback_on_step_end=interrupt)
        kept = handle.held_bytes()
        del caught
        gc.collect()  # pytest's, for the cycle between an exception and its traceback
        assert handle.held_bytes() == 0 <= kept


@every_method
def test_a_run_that_breaks_off_inside_a_block_is_freed_at_once(config, transformer):
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Interruption

    hook = transformer.single_transformer_blocks[-1].register_forward_hook(fail)
    with h2cache.apply(transformer, config) as handle:
        with pytest.raises(Interruption) as caught:
            denoise(transformer, steps=12)
        assert handle.held_bytes() == 0
        hook.remove()
        del caught


@every_method
def test_a_loop_that_is_dropped_is_freed(config, transformer):
    gc.collect()
    gc.disable()
    try:
        with h2cache.apply(transformer, config) as handle:
            loop = denoising(transformer)
            for _ in range(5):
                next(loop)
            assert handle.held_bytes() > 0
            del loop
            assert handle.held_bytes() == 0, "by counting references, without a garbage collection"
    finally:
        gc.enable()


@every_method
def test_removal_and_reset_free_a_run_in_progress(config, transformer):
    for end in ("remove", "reset"):
        handle = h2cache.apply(transformer, config)
        loop = denoising(transformer)
        gc.collect()
        before = live_bytes()
        latents = [next(loop) for _ in range(5)][-1]
        held = handle.held_bytes()
        during = live_bytes()
        assert held > 0
        getattr(handle, end)()
        assert handle.held_bytes() == 0
        assert during - live_bytes() == held and live_bytes() >= before
        del latents
        for _ in loop:
            pass
        handle.remove()


# On the device nobody reads the timesteps of a schedule.
IN_SCHEDULED = {method.id for method in SCHEDULED}


@product(
    "config, on_device",
    METHODS,
    named({"cpu-timestep": False, "device-timestep": True}),
    kept=lambda method, place: (place == "device-timestep") == (method in IN_SCHEDULED),
)
def test_twelve_runs_do_not_grow(config, on_device, transformer, monkeypatch):
    """Runs that end and runs that fail after their warm-up; tensors are counted, not estimated.

    Where a schedule is given its timesteps on an accelerator, nobody reads them. They stay there, one number a step, as
    long as the record does."""
    if on_device:
        hide_timesteps(monkeypatch)
    unread = on_device and not measures(config)

    def session(runs: int) -> None:
        for number in range(runs):
            if number % 3 == 2:
                loop = denoising(transformer, seed=number, batch=2)
                next(loop), next(loop), next(loop)
                continue
            denoise(transformer, seed=number, batch=1 + number % 2, steps=4)

    with h2cache.apply(transformer, config) as handle:
        session(3)
        handle.trace.clear()
        gc.collect()
        before = live_bytes()
        session(12)
        assert handle.held_bytes() == 0
        gc.collect()
        if unread:
            assert 0 < live_bytes() - before <= 12 * 13 * torch.float32.itemsize, "each loop's row of timesteps"
            handle.trace.clear()
        assert live_bytes() == before


def test_the_record_is_bounded(transformer):
    """A service that draws for weeks keeps the last runs' rows and no others."""
    with h2cache.apply(transformer, METHODS[-1].values[0]) as handle:
        for _ in range(3):
            denoise(transformer, steps=1)
        for _ in range(KEPT_RUNS + 50):
            handle.trace.begin_run({"network": 5}, total_blocks=5)
        assert len(handle.trace._runs) == KEPT_RUNS


# --- after everything -----------------------------------------------------------------------------------------------


@every_method
def test_a_removed_cache_does_not_keep_the_model(config):
    """As a model that was never cached, it goes with its last reference; no garbage collection is needed."""

    gc.collect()
    gc.disable()
    try:
        model = tiny_transformer()
        watched = weakref.ref(model)
        denoise(model, steps=2)
        del model
        assert watched() is None, "torch and diffusers keep it alive themselves"
        model = tiny_transformer()
        watched = weakref.ref(model)
        with h2cache.apply(model, config):
            denoise(model, steps=2)
        del model
        assert watched() is None
    finally:
        gc.enable()


@every_method
def test_a_dropped_pipeline_and_handle_are_collected(config, tiny_pipe):
    """Without `remove`: the model wears the cache and the cache knows the model, so this takes a garbage collection."""
    pipe = own_pipeline(tiny_pipe, transformer=copy.deepcopy(tiny_pipe.transformer))
    handle = h2cache.apply(pipe, config)
    picture(pipe, steps=3)
    watched = weakref.ref(pipe.transformer), weakref.ref(handle._engines[0])
    del pipe, handle
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


@every_method
def test_a_kept_handle_does_not_keep_memory(config, tiny_pipe):
    """Traces are for reading after the fact."""
    handle = h2cache.apply(tiny_pipe, config)
    picture(tiny_pipe, steps=4)
    handle.remove()
    assert handle.held_bytes() == 0 and len(handle.trace) > 0
    assert handle.summary()["runs"] == 1
