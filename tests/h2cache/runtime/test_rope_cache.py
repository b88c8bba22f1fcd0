"""The rotary table of a run's positions is made once, and only where it is certain to stay the same."""

from functools import wraps

import pytest
import torch
from loops import denoise, denoising
from methods_under_test import METHODS
from nunchakus import nunchaku, subject  # noqa: F401
from pictures import picture
from tiny import tiny_transformer
from torch.nn.modules.module import register_module_forward_hook

import h2cache
from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig
from h2cache.runtime.interception import interception_of


def counted(patch, module):
    """The position ids of every table that modules of this class make. It looks like the class's own forward."""
    seen, forward = [], type(module).forward

    @wraps(forward)
    def counting(self, ids):
        seen.append(ids)
        return forward(self, ids)

    patch.setattr(type(module), "forward", counting)
    return seen


@pytest.fixture
def made(transformer, monkeypatch):
    """The position ids of every table that is made."""
    return counted(monkeypatch, transformer.pos_embed)


@pytest.mark.parametrize("config", METHODS)
def test_once_a_run(config, transformer, made):
    with h2cache.apply(transformer, config):
        for runs in (1, 2):
            denoise(transformer, steps=8, batch=2)
            assert len(made) == runs
    denoise(transformer, steps=3)
    assert len(made) == 2 + 3


def test_the_same_table_comes_back_to_the_last_bit(transformer):
    tables = []
    block = transformer.transformer_blocks[0]
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: tables.append(kwargs["image_rotary_emb"]), with_kwargs=True
    )
    denoise(transformer, steps=2)
    with h2cache.apply(transformer, H2CacheConfig(tau1=-1, tau2=-1)):
        denoise(transformer, steps=2)
    hook.remove()
    assert tables[2] is tables[3] and tables[0] is not tables[1]
    for plain, kept in zip(tables[0], tables[3], strict=True):
        assert torch.equal(plain, kept)


def test_once_for_each_branch_of_guidance(tiny_pipe, monkeypatch):
    """The text of each has position ids of its own."""
    seen = counted(monkeypatch, tiny_pipe.transformer.pos_embed)
    with h2cache.apply(tiny_pipe, H2CacheConfig()):
        picture(tiny_pipe, "a sign", negative_prompt="blurry", true_cfg_scale=2.0)
    assert len(seen) == 2


def anew(step, call):
    call["txt_ids"] = torch.zeros(6, 3)


def written(step, call):
    call["txt_ids"] += 1.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [anew, written])
def test_other_positions_are_other_tables(change, mode, transformer, made):
    """Text ids that come anew at each step, or are written to."""
    with mode():
        expected = denoise(transformer, steps=4, before_step=change)
        del made[:]
        with h2cache.apply(transformer, H2CacheConfig(tau1=-1, tau2=-1)):
            assert torch.equal(denoise(transformer, steps=4, before_step=change), expected)
    assert len(made) == 4


def test_other_constants_are_other_tables(transformer):
    """As where positions are rescaled by the timestep."""

    def rescale(step, call):
        transformer.pos_embed.theta = 10000 * (1 + step)

    expected = denoise(transformer, steps=4, before_step=rescale)
    with h2cache.apply(transformer, H2CacheConfig(tau1=-1, tau2=-1)):
        assert torch.equal(denoise(transformer, steps=4, before_step=rescale), expected)


def test_transformers_that_share_the_embedding(transformer):
    other = tiny_transformer()
    other.pos_embed = transformer.pos_embed
    expected = [denoise(model, steps=3) for model in (transformer, other)]
    with h2cache.apply(transformer, H2CacheConfig(tau1=-1, tau2=-1)) as first:
        with h2cache.apply(other, H2CacheConfig(tau1=-1, tau2=-1)):
            for model, image in zip((transformer, other, transformer), (*expected, expected[0]), strict=True):
                assert torch.equal(denoise(model, steps=3), image)
        first.remove()
    assert interception_of(transformer.pos_embed) is None


def test_applying_again_goes_on(transformer, made):
    for _ in range(2):
        h2cache.apply(transformer, H2CacheConfig())
    denoise(transformer, steps=5)
    assert len(made) == 1


def test_an_embedding_that_follows_the_timestep_is_left_alone(transformer):
    """As those that stretch positions while they denoise."""

    class Stretched(type(transformer.pos_embed)):
        calls = 0

        def forward(self, ids):
            self.calls += 1
            return super().forward(ids * (1 + self.calls / 10))

    plain = transformer.pos_embed
    transformer.pos_embed = Stretched(plain.theta, plain.axes_dim)
    expected = denoise(transformer, steps=4)
    transformer.pos_embed.calls = 0
    with h2cache.apply(transformer, BlockCacheConfig(threshold=-1)):
        assert torch.equal(denoise(transformer, steps=4), expected)
    assert transformer.pos_embed.calls == 4


def hooked(module, calls):
    return module.register_forward_hook(lambda *args: calls.append(1)).remove


def wrapped(module, calls):
    forward = module.forward
    module.forward = lambda ids: calls.append(1) or forward(ids)
    return lambda: vars(module).pop("forward")


def hooked_everywhere(module, calls):
    return register_module_forward_hook(lambda each, *args: calls.append(1) if each is module else None).remove


def compiled(module, calls):
    module.compile(backend=lambda graph, inputs: lambda *args: calls.append(1) or graph(*args))
    return lambda: vars(module).pop("_compiled_call_impl")


def patched(module, calls):
    kind, forward = type(module), type(module).forward
    kind.forward = lambda self, ids: calls.append(1) or forward(self, ids)
    return lambda: setattr(kind, "forward", forward)


@pytest.mark.parametrize("watch", [hooked, hooked_everywhere, wrapped, compiled, patched])
def test_who_watches_the_embedding_sees_every_call(watch, transformer):
    calls = []
    undo = watch(transformer.pos_embed, calls)
    with h2cache.apply(transformer, H2CacheConfig()):
        denoise(transformer, steps=5)
    undo()
    assert len(calls) == 5


def test_a_table_of_inference_mode_is_not_used_for_gradients(transformer):
    """One run, its first step without gradients and its second with them."""
    calls = []
    denoise(transformer, steps=2, before_step=lambda step, call: calls.append(dict(call)))
    first, second = calls
    second["hidden_states"] = second["hidden_states"].clone().requires_grad_()
    with h2cache.apply(transformer, H2CacheConfig(tau1=-1, tau2=-1)) as handle:
        with torch.inference_mode():
            transformer(**first)
        transformer(**second)[0].sum().backward()
        assert handle.summary()["runs"] == 1 and second["hidden_states"].grad.abs().sum() > 0


def test_without_a_cache_nothing_is_kept(transformer, made):
    handle = h2cache.apply(transformer, H2CacheConfig())
    steps = denoising(transformer, steps=6)
    next(steps), next(steps)
    handle.remove()
    next(steps), next(steps)
    assert len(made) == 3 and handle.held_bytes() == 0


def test_nunchaku_s_table_too(subject):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch, h2cache.apply(subject.transformer, H2CacheConfig()):
        seen = counted(patch, subject.transformer.pos_embed)
        subject.denoise(steps=4)
    assert len(seen) == 1
