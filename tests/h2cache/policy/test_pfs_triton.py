"""The fused probe equals the plain one, op by op.

It runs on CUDA only. Where there is none, Triton's interpreter runs the kernel on the CPU (in a copy of this process,
as it must be chosen before Triton is imported), and its compiler makes the machine code of a GPU that is not there.
"""

import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from loops import denoise
from thorough import named, product
from tiny import tiny_transformer

import h2cache
from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig, TeaCacheConfig
from h2cache.policy import pfs, probes

triton = pytest.importorskip("triton", reason="torch's CPU builds come without Triton")

from h2cache.policy import pfs_triton  # noqa: E402  (it imports Triton)


@pytest.fixture(scope="module")
def interpreter():
    """`interpreter(check, *args)` calls a function of this file where `pfs_triton` is interpreted."""
    fork = multiprocessing.get_context("fork")  # a new process would import torch and diffusers again
    with ProcessPoolExecutor(1, fork, interpret) as process:
        yield lambda check, *args: process.submit(check, *args).result()


def interpret() -> None:
    """Import Triton and the kernel again, as interpreted."""
    global pfs_triton
    os.environ["TRITON_INTERPRET"] = "1"
    for name in list(sys.modules):
        if name == pfs_triton.__name__ or (name.split(".")[0] == "triton" and not name.startswith("triton._C")):
            del sys.modules[name]
    pfs_triton = importlib.import_module(pfs_triton.__name__)
    assert "Interpreted" in type(pfs_triton._observe).__name__


def features(text: int, image: int, width: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """The parts of a token sequence, of multiples of 1/4, so that no dtype rounds their sums and differences."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-16, 17, (1, tokens, width), generator=generator).div(4).to(dtype)
        for tokens in (text, image)
        if tokens
    ]


DTYPES = ["float32", "float16", "bfloat16"]
SHAPES = {
    "whole": (0, 16, 24, None),
    "stride-of-2": (0, 16, 24, 8),  # structure at FLUX.1-dev's stride
    "straddling": (10, 16, 24, 2),  # windows that straddle text and image, stride 13
    "tokens-left": (5, 23, 10, 3),  # tokens and channels left over
    "wide": (5, 7, 3, 1),  # more tokens a window than channels
    "columns": (0, 2, 5000, None),  # more columns than one program takes
}


def in_turn(shape: str, before: str, dtype: str) -> bool:
    """Every shape with and without a `before`, each in another dtype."""
    return (list(SHAPES).index(shape) + (before == "before")) % 3 == DTYPES.index(dtype)


@product(
    "text, image, width, target, with_before, dtype",
    [pytest.param(*shape, id=name) for name, shape in SHAPES.items()],
    named({"before": True, "alone": False}),
    named({name: getattr(torch, name) for name in DTYPES}),
    kept=in_turn,
)
def test_interpreted_equals_plain(interpreter, text, image, width, target, with_before, dtype):
    interpreter(equals_plain, text, image, width, target, with_before, dtype)


def equals_plain(text, image, width, target, with_before, dtype):
    after = features(text, image, width, dtype, 0)
    before = features(text, image, width, dtype, 1) if with_before else None
    strides = pfs.strides(text + image, width, target)
    plain, nothing = pfs.observe(after, before, target, None)
    summary, compared = pfs_triton.observe(after, before, strides, None)
    assert nothing is None and compared is None
    torch.testing.assert_close(summary, plain, rtol=1e-6, atol=1e-6)

    reference = torch.randn_like(plain)
    _, plain_deviation = pfs.observe(after, before, target, reference)
    _, deviation = pfs_triton.observe(after, before, strides, reference)
    torch.testing.assert_close(deviation, plain_deviation, rtol=1e-5, atol=1e-6)


def test_interpreted_reads_views_of_a_joint_sequence(interpreter):
    """Streams are often slices of one tensor [text; image], of which only the channels are dense."""
    interpreter(reads_views)


def reads_views():
    after, before = (torch.cat(features(5, 11, 8, torch.float32, seed), dim=1) for seed in (0, 1))
    plain, _ = pfs.observe([after - before], None, 4, None)
    split = [[joint[:, :5], joint[:, 5:]] for joint in (after, before)]
    summary, _ = pfs_triton.observe(*split, pfs.strides(16, 8, 4), None)
    torch.testing.assert_close(summary, plain)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_interpreted_hides_no_odd_number(interpreter, odd):
    """A probe that is not finite must be seen not to be (rule 6)."""
    interpreter(hides_nothing, odd)


def hides_nothing(odd):
    after, before = (features(0, 16, 8, torch.float32, seed) for seed in (0, 1))
    after[0][0, 9, 5] = odd
    _, deviation = pfs_triton.observe(after, before, (2, 2), torch.ones(1, 8, 4))
    assert not deviation[0].isfinite() and deviation[1].isfinite()


@pytest.mark.parametrize(
    "config",
    [
        H2CacheConfig(tau1=0.3, tau2=0.35, pool1=4, pool2=6),
        BlockCacheConfig(threshold=0.3),
        TeaCacheConfig(threshold=0.4, coefficients=(1.0, 0.0)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_interpreted_methods_decide_alike(interpreter, config):
    interpreter(decides_alike, config)


def decides_alike(config):
    def run() -> tuple[list, torch.Tensor]:
        transformer = tiny_transformer()
        with h2cache.apply(transformer, config) as handle:
            image = denoise(transformer, steps=8)
        return [(row.stage, row.decision) for row in handle.trace], image

    def always_fused(after, before, target, reference, shards=None):
        tokens = sum(part.shape[1] for part in after)
        return pfs_triton.observe(after, before, pfs.strides(tokens, after[0].shape[2], target), reference)

    decisions, image = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "observe", always_fused)
        fused_decisions, fused_image = run()
    assert len({decision for _, decision in decisions}) >= 3  # warm-up, computed, hit
    assert fused_decisions == decisions
    assert torch.equal(fused_image, image)


@pytest.mark.parametrize(("stride", "padded"), [(1, 1), (2, 2), (12, 16)])
def test_it_compiles_for_a_gpu(stride, padded):
    """Down to machine code, with FLUX.1-dev's strides: what no interpreter proves."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = ["*bf16"] * 4 + ["*fp32"] * 3 + ["i32"] * 4 + ["constexpr"] * 6
    constants = {
        "POOL_TOKENS": stride,
        "POOL_CHANNELS": stride,
        "PADDED": padded,
        "COLUMNS": pfs_triton.TILE // padded,
        "HAS_BEFORE": True,
        "HAS_REFERENCE": True,
    }
    signature = dict(zip(pfs_triton._observe.arg_names, types, strict=True))
    source = ASTSource(pfs_triton._observe, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_equals_the_plain_probe():
    after, before = ([part.cuda() for part in features(512, 4096, 3072, torch.bfloat16, seed)] for seed in (0, 1))
    reference = torch.randn(1, 384, 256, device="cuda")
    summary, deviation = pfs.observe(after, before, 384, reference)
    changes = torch.cat([a - b for a, b in zip(after, before, strict=True)], dim=1)
    torch.testing.assert_close(summary, pfs.summarize(changes, 384), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(deviation, pfs.deviation(reference, summary), rtol=1e-5, atol=1e-6)
