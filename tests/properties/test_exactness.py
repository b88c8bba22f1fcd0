"""Rule 1: a cache that never hits changes no bit, and a cache that was removed has left no trace on the model."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from attachments import assert_same_inside, inside
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from loops import blocks_of, denoise, denoising
from methods_under_test import KINDS, every_method, every_method_once, never_hitting, skips_modules, some_kinds
from peft import LoraConfig
from pictures import is_mixed, picture
from thorough import named, product
from tiny import tiny_transformer
from torch import nn

import h2cache
from h2cache.baselines import HiCacheConfig, TaylorSeerConfig

REQUESTS = {
    "plain": {},
    "batch": {"prompt": ["a red stop sign", "a blue shirt", "a label"]},
    "true-cfg": {"negative_prompt": "blurry", "true_cfg_scale": 3.0},
    "one-step": {"steps": 1},
    "pixels": {"output_type": "pt"},
}


@every_method_once("request_", REQUESTS, most="plain")
def test_never_hitting_changes_no_bit(config, request_, tiny_pipe):
    untouched = picture(tiny_pipe, **request_)
    with h2cache.apply(tiny_pipe, never_hitting(config)) as handle:
        assert torch.equal(picture(tiny_pipe, **request_), untouched)
    assert handle.summary()["computed_fraction"] == 1
    assert torch.equal(picture(tiny_pipe, **request_), untouched)  # and nothing of it stays


@some_kinds
def test_never_hitting_changes_no_bit_on_flux_mini(config, flux_mini):
    prompt = ["a red sign that says STOP", "a blue shirt"]
    options = dict(steps=5, height=128, width=128, max_sequence_length=64)
    untouched = picture(flux_mini, prompt, **options)
    with h2cache.apply(flux_mini, never_hitting(config)):
        assert torch.equal(picture(flux_mini, prompt, **options), untouched)


# --- removal --------------------------------------------------------------------------------------------------------


def files_of(model: nn.Module, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@every_method
def test_removal_leaves_the_model_as_it_was(config, transformer, tmp_path):
    plain = denoise(transformer)
    saved = files_of(transformer, tmp_path / "before")  # first: saving is what notes a class and a version on the model
    before, pickled = inside(transformer), pickle.dumps(transformer)
    state = {name: value.clone() for name, value in transformer.state_dict().items()}

    handle = h2cache.apply(transformer, config)
    assert not torch.equal(denoise(transformer), plain)
    handle.remove()

    assert_same_inside(transformer, before)
    assert pickle.dumps(transformer) == pickled
    assert files_of(transformer, tmp_path / "after") == saved
    after = transformer.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(denoise(transformer), plain)
    assert torch.equal(denoise(copy.deepcopy(transformer)), plain)
    assert len(handle.trace) > 0, "the record outlives the method"


@every_method
def test_a_model_is_copied_and_saved_without_its_cache(config, transformer, tmp_path):
    plain, saved = denoise(transformer), files_of(transformer, tmp_path / "before")
    before, pickled = inside(transformer), pickle.dumps(transformer)
    with h2cache.apply(transformer, config) as handle:
        cached = denoise(transformer)
        assert is_mixed(handle)
        decisions = len(handle.trace)
        assert pickle.dumps(transformer) == pickled
        assert files_of(transformer, tmp_path / "applied") == saved
        for copied in (copy.deepcopy(transformer), copy.copy(transformer), pickle.loads(pickled)):
            assert not vars(copied).keys() - vars(transformer).keys()
        assert torch.equal(denoise(copy.deepcopy(transformer)), plain)
        assert torch.equal(denoise(pickle.loads(pickled)), plain)
        assert len(handle.trace) == decisions, "a copy does not report to the original's handle"
        assert torch.equal(denoise(transformer), cached), "and copying does not disturb the original"
    assert_same_inside(transformer, before)


@every_method
def test_the_context_manager_removes_also_when_it_fails(config, transformer):
    before = inside(transformer)
    with pytest.raises(ZeroDivisionError), h2cache.apply(transformer, config):
        denoise(transformer)
        1 / 0  # noqa: B018
    assert_same_inside(transformer, before)


@every_method
def test_removal_in_the_middle_of_a_run(config, transformer):
    """The rest of the run is computed in full, as if the cache had been told to miss from there on."""
    before = inside(transformer)
    with h2cache.apply(transformer, config) as handle:
        reference = [
            (handle.update(**never(config)) if step == 5 else None, latents)[1]
            for step, latents in enumerate(denoising(transformer))
        ]
    handle = h2cache.apply(transformer, config)
    for step, latents in enumerate(denoising(transformer)):
        assert torch.equal(latents, reference[step])
        if step == 5:
            handle.remove()
            assert_same_inside(transformer, before)


def never(config: h2cache.CacheConfig) -> dict[str, float]:
    """The changes that make `config` never hit."""
    off = never_hitting(config)
    return {name: value for name, value in vars(off).items() if value != getattr(config, name)}


@every_method
def test_applying_again_replaces_and_old_handles_are_harmless(config, transformer):
    before = inside(transformer)
    with h2cache.apply(transformer, config):
        expected = denoise(transformer)

    first = h2cache.apply(transformer, never_hitting(config))
    second = h2cache.apply(transformer, config)
    assert torch.equal(denoise(transformer), expected)
    assert len(first.trace) == 0 and first.held_bytes() == 0
    first.remove()
    with pytest.raises(RuntimeError, match="removed or replaced"):
        first.update(**never(config))
    assert torch.equal(denoise(transformer), expected), "the second is still at work"
    third = h2cache.apply(transformer, config)
    second.remove()
    assert torch.equal(denoise(transformer), expected)
    third.remove()
    third.remove()
    assert_same_inside(transformer, before)


@every_method
def test_applying_again_in_the_middle_of_a_run(config, transformer):
    """Half a run under one method, half under another: the second begins with nothing and computes."""
    handle, seen = h2cache.apply(transformer, config), 0
    for step, _ in enumerate(denoising(transformer, steps=10)):
        if step == 4:
            seen = len(handle.trace)
            after = h2cache.apply(transformer, config)
    assert len(handle.trace) == seen
    assert next(row.step for row in after.trace) == 0
    assert next(iter(after.trace)).decision == h2cache.Decision.WARMUP
    after.remove()


@pytest.mark.parametrize("config", [TaylorSeerConfig(interval=3), HiCacheConfig(interval=3, sigma="auto")])
def test_another_granularity_leaves_nothing_of_the_one_before(config, transformer):
    """Modules inside blocks are watched while a method skips them, and no longer."""
    before, expected, watched = inside(transformer), {}, {}
    for granularity in ("module", "stage"):
        with h2cache.apply(transformer, config.updated(granularity=granularity)):
            watched[granularity] = inside(transformer).keys()
            expected[granularity] = denoise(transformer)
    assert before.keys() < watched["stage"] < watched["module"]
    with h2cache.apply(transformer, config) as handle:
        for granularity in ("stage", "module", "stage", "module"):
            handle.update(granularity=granularity)
            assert torch.equal(denoise(transformer), expected[granularity])
            assert inside(transformer).keys() == watched[granularity]
    assert_same_inside(transformer, before)


# --- among others that change a model -------------------------------------------------------------------------------


@dataclass
class Other:
    """Something else that a model may wear: how it is put on and taken off again."""

    put_on: Callable[[nn.Module], Any]
    take_off: Callable[[nn.Module, Any], None]


class PlusOne(ModelHook):
    """An accelerate hook that changes what a block returns, so that a lost hook shows in the image."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return tuple(stream + 0.01 for stream in output)


class DiffusersPlusOne(DiffusersHook):
    """The same for diffusers' hook registry."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return tuple(stream + 0.01 for stream in output)


def plus_one(module: nn.Module, args: tuple, output: Any) -> Any:
    return tuple(stream + 0.01 for stream in output)


def put_on_compile(model: nn.Module) -> None:
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)


def take_off_compile(model: nn.Module, _: Any) -> None:
    """The way back that torch offers: none. A user can only fetch the model again."""


def put_on_lora(model: nn.Module) -> None:
    """On attention and on modules that a method may skip, which PEFT puts others in the place of."""
    torch.manual_seed(7)
    targets = ["to_q", "to_k", "proj_mlp", "proj_out"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="test")


def take_off_lora(model: nn.Module, _: Any) -> None:
    model.unload_lora()


def put_on_registry(model: nn.Module) -> None:
    for block in blocks_of(model):
        HookRegistry.check_if_exists_or_initialize(block).register_hook(DiffusersPlusOne(), "plus_one")


def take_off_registry(model: nn.Module, _: Any) -> None:
    for block in blocks_of(model):
        block._diffusers_hook.remove_hook("plus_one")


OTHERS = {
    "forward-hooks": Other(
        lambda model: [block.register_forward_hook(plus_one) for block in blocks_of(model)],
        lambda model, hooks: [hook.remove() for hook in hooks] and None,
    ),
    "accelerate": Other(
        lambda model: [add_hook_to_module(block, PlusOne()) for block in blocks_of(model)],
        lambda model, _: [remove_hook_from_module(block) for block in blocks_of(model)] and None,
    ),
    "diffusers-hooks": Other(put_on_registry, take_off_registry),
    "lora": Other(put_on_lora, take_off_lora),
}
COMPILE = Other(put_on_compile, take_off_compile)

ORDERS = {
    "other-apply-remove-other": ["put_on", "apply", "remove", "take_off"],
    "apply-other-remove-other": ["apply", "put_on", "remove", "take_off"],
    "other-apply-other-remove": ["put_on", "apply", "take_off", "remove"],
    "apply-other-other-remove": ["apply", "put_on", "take_off", "remove"],
}


def anatomy(model: nn.Module) -> dict[tuple[str, str], Any]:
    """As `inside`, but comparable between two models: classes and names in place of objects."""
    return {
        place: sorted(map(str, value)) if isinstance(value, dict) else getattr(value, "__qualname__", type(value))
        for place, value in inside(model).items()
        if place[1] != "_forward_hooks_ids"
    }


WEARS_MOST = next(method for method in KINDS if skips_modules(method.values[0]))
BETWEEN = {"runs-between": True, "no-runs-between": False}


def of_removal(method: str, other: str, order: str, between: str) -> bool:
    """Every other in every order, with runs between or without, for the method that wears the most; every other for the
    first method, and one for each other kind.
    """
    others, orders = list(OTHERS), list(ORDERS)
    turn = (others.index(other) + orders.index(order)) % 2 == list(BETWEEN).index(between)
    if method == WEARS_MOST.id:
        return turn
    number = [kind.id for kind in KINDS].index(method)
    if method == KINDS[0].id:
        return turn and orders.index(order) == others.index(other)
    return between == "runs-between" and order == orders[number % 4] and other == others[number % 4]


@product("config, other, order, runs_between", KINDS, named(OTHERS), named(ORDERS), named(BETWEEN), kept=of_removal)
def test_removal_in_any_order(config, other, order, runs_between):
    """Every image and in the end every attribute is that of a model that wore only the other."""
    cached, plain = tiny_transformer(), tiny_transformer()
    handle = worn = worn_plain = None
    for event in order:
        if event == "put_on":
            worn, worn_plain = other.put_on(cached), other.put_on(plain)
        elif event == "take_off":
            other.take_off(cached, worn), other.take_off(plain, worn_plain)
        elif event == "apply":
            handle = h2cache.apply(cached, never_hitting(config))
        else:
            handle.remove()
        if runs_between:
            assert torch.equal(denoise(cached, steps=2), denoise(plain, steps=2)), event
    assert torch.equal(denoise(cached, steps=2), denoise(plain, steps=2))
    assert anatomy(cached) == anatomy(plain)


@product(
    "order, runs_between",
    named({name: order for name, order in ORDERS.items() if name.endswith("remove-other")}),
    named(BETWEEN),
    kept=lambda order, between: between == "runs-between",
)
def test_removal_from_compiled_blocks(order, runs_between):
    """Compiling takes seconds and is never taken off: one method, two orders."""
    test_removal_in_any_order(KINDS[0].values[0], COMPILE, order, runs_between)
