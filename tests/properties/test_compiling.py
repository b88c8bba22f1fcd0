"""Rule 5: blocks that are compiled, one by one or all, and blocks and modules that others take the place of."""

import copy
from functools import partial

import pytest
import torch
from loops import blocks_of, denoise
from methods_under_test import (
    EARLY,
    KINDS,
    METHODS,
    MODULES,
    has_clusters,
    skips_modules,
)
from pictures import cached, is_mixed
from tiny import tiny_transformer
from torch._dynamo.testing import CompileCounter

import h2cache

before_or_after = pytest.mark.parametrize("when", ["before", "after"])


@pytest.fixture(scope="module")
def graphs() -> int:
    """How many graphs the blocks of the tiny transformer are compiled to without a cache."""
    torch._dynamo.reset()
    plain, counter = tiny_transformer(), CompileCounter()
    plain.compile_repeated_blocks(backend=counter, fullgraph=True)
    denoise(plain, steps=2)
    return counter.frame_count


# Compiling takes seconds. Methods that skip inside blocks compile nothing.
COMPILED = [
    pytest.param(method.values[0], when, id=f"{method.id}-{when}", marks=marks)
    for methods, when, marks in (
        (KINDS[:1] + EARLY, "after", ()),
        (MODULES[-1:], "before", ()),
        (METHODS[-1:], "after", pytest.mark.thorough),
        (KINDS[:1], "before", pytest.mark.thorough),
        (MODULES[-1:], "after", pytest.mark.thorough),
    )
    for method in methods
]


@pytest.mark.parametrize(("config", "when"), COMPILED)
def test_compiled_blocks(config, when, transformer, graphs):
    """The blocks are compiled and the decisions are not: the same images, and later steps compile nothing again."""
    requests = [dict(), dict(batch=3), dict(batch=3, seed=5), dict()]
    with h2cache.apply(transformer, config):
        expected = [denoise(transformer, steps=12, **request) for request in requests]

    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    change = partial(transformer.compile_repeated_blocks, backend=counter, fullgraph=True)
    with cached(transformer, config, when, change) as handle:
        for request, latents in zip(requests, expected, strict=True):
            torch.testing.assert_close(denoise(transformer, steps=12, **request), latents, rtol=1e-4, atol=1e-4)
            counts.append(counter.frame_count)
        assert is_mixed(handle)
    if skips_modules(config):
        assert counts == [0] * 4, "compiled code would not stop at the modules"
        return
    assert counts[0] == graphs, "as many as without the cache"
    assert counts[1] <= 2 * graphs, "and once more for any number of samples"
    assert counts[1] == counts[2] == counts[3]
    denoise(transformer)
    assert counter.frame_count == counts[3], "the compiled blocks outlive the cache"


@before_or_after
@pytest.mark.parametrize("config", METHODS[-1:] + MODULES[-1:])
def test_blocks_compiled_one_by_one_in_their_list(config, when):
    """`blocks[i] = torch.compile(blocks[i])` puts another module in the block's place."""
    transformer = tiny_transformer(double=1, single=2)
    with h2cache.apply(transformer, config):
        expected = denoise(transformer, steps=12)
    torch._dynamo.reset()

    def compile_blocks() -> None:
        for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            for index, block in enumerate(blocks):
                blocks[index] = torch.compile(block, backend="eager")

    with cached(transformer, config, when, compile_blocks) as handle:
        torch.testing.assert_close(denoise(transformer, steps=12), expected)
        assert is_mixed(handle)


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile(model)", "model.compile()"])
def test_a_transformer_compiled_as_a_whole_is_refused(in_place, transformer):
    """Its graph would swallow the decisions, and every step would silently be computed in full."""
    torch._dynamo.reset()
    if in_place:
        transformer.compile(backend="eager")
    with pytest.raises(TypeError, match="compile_repeated_blocks"):
        h2cache.apply(transformer if in_place else torch.compile(transformer, backend="eager"), METHODS[0].values[0])


@pytest.mark.parametrize("config", KINDS)
def test_a_block_that_was_replaced_after_apply(config, transformer):
    """A new block in the list is the model's block from then on: it is skipped with its stage, or refused out loud."""
    with h2cache.apply(transformer, config):
        expected = denoise(transformer)
    with h2cache.apply(transformer, config):
        transformer.single_transformer_blocks[1] = copy.deepcopy(transformer.single_transformer_blocks[1])
        try:
            latents = denoise(transformer)
        except (RuntimeError, ValueError):
            return
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("part", ["attn", "ff", "proj_mlp", "proj_out"])
@pytest.mark.parametrize("config", MODULES)
def test_a_module_that_was_replaced_after_apply(config, part, transformer):
    """A new module inside a block is answered for from then on, as the one before was."""
    blocks = [block for block in blocks_of(transformer) if hasattr(block, part)]
    modules = [module for block in blocks for module in block.modules() if module is getattr(block, part)]
    with h2cache.apply(transformer, config):
        expected = denoise(transformer)
        for block in blocks:
            setattr(block, part, copy.deepcopy(getattr(block, part)))
        for module in modules:
            module.register_forward_pre_hook(lambda *_: pytest.fail("the one before is gone"))
        calls = []
        for block in blocks:
            getattr(block, part).register_forward_pre_hook(lambda *_: calls.append(1))
        assert torch.equal(denoise(transformer), expected)
    if part != "ff" or not has_clusters(config):  # which runs for a few tokens
        assert 0 < len(calls) < 12 * len(blocks), "it is left out where its block is skipped"
