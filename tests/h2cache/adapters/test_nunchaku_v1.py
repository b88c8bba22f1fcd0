"""The first generation's own: what the core is asked for, and what a hit costs besides."""
# ruff: noqa: F811 - fixtures

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from loops import denoise, denoising
from methods_under_test import KINDS, never_hitting
from nunchakus import ONE_OF_EACH_SORT, STAGED, Subject, flux, nunchaku, standin  # noqa: F401
from thorough import product
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import h2cache
from h2cache import H2CacheConfig
from h2cache.adapters import adapter_of
from h2cache.adapters.flux import FluxAdapter
from h2cache.adapters.nunchaku import NunchakuFluxV1, NunchakuFluxV2
from h2cache.baselines import BlockCacheConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.runtime import block_stage
from h2cache.runtime.decide import decide

every_method = pytest.mark.parametrize("config", STAGED)
kinds = pytest.mark.parametrize("config", [method for method in STAGED if method in KINDS])
CORE = ("forward", "forward_layer", "forward_single_layer", "norm_one_forward")


@pytest.fixture
def v1(nunchaku) -> Subject:
    return standin(nunchaku, "v1", flux())


@contextmanager
def asked_for(subject: Subject, watch: Callable[[str, Callable, tuple], Any]) -> Iterator[None]:
    """Every call of the core goes through `watch(name, function, args)`."""
    core = subject.front.m
    for name in CORE:
        function = getattr(core, name)
        vars(core)[name] = lambda *args, name=name, function=function: watch(name, function, args)
    try:
        yield
    finally:
        for name in CORE:
            del vars(core)[name]


def core_calls(subject: Subject, config: h2cache.CacheConfig, **options: Any) -> tuple[list[list[str]], h2cache.Handle]:
    """For every step, what the core was asked for: layers by their number, the rest behind the first as "rest"."""
    steps: list[list[str]] = []

    def note(name: str, function: Callable, args: tuple) -> Any:
        short = {"forward_layer": "d", "forward_single_layer": "s", "norm_one_forward": "norm"}
        if name == "forward":
            steps[-1].append("rest" if args[8] else "all")
        else:
            steps[-1].append(f"{short[name]}{args[0]}")
        return function(*args)

    with asked_for(subject, note), h2cache.apply(subject.transformer, config) as handle:
        subject.denoise(before_step=lambda step, call: steps.append([]), **options)
    return steps, handle


def test_a_whole_network_is_computed_in_one_call_behind_its_first_layer(v1):
    steps, handle = core_calls(v1, BlockCacheConfig(threshold=0.3))
    assert {row.decision.skips for row in handle.trace} == {True, False}
    assert steps == [["d0"] if row.decision.skips else ["d0", "rest"] for row in handle.trace]


def test_teacache_looks_at_the_first_norm_and_asks_for_nothing_else_on_a_hit(v1):
    steps, handle = core_calls(v1, TeaCacheConfig(threshold=0.4, coefficients=(1.0, 0.0)))
    assert {row.decision.skips for row in handle.trace} == {True, False}
    assert steps == [["norm0"] if row.decision.skips else ["norm0", "d0", "rest"] for row in handle.trace]


def test_stages_are_computed_layer_by_layer(v1):
    steps, handle = core_calls(v1, H2CacheConfig(tau1=0.3, tau2=0.35, hierarchical=False))
    skipped = [(row.stage, row.decision.skips) for row in handle.trace]
    for step, (double, single) in enumerate(zip(skipped[::2], skipped[1::2], strict=True)):
        wanted = ["d0"] if double[1] else ["d0", "d1"]
        wanted += ["s0"] if single[1] else ["s0", "s1", "s2"]
        assert steps[step] == wanted
    assert len(set(skipped)) == 4


def test_a_schedule_asks_for_nothing_where_it_skips(v1):
    steps, handle = core_calls(v1, TaylorSeerConfig(interval=3, granularity="stage"))
    skipped = [row.decision.skips for row in handle.trace if row.stage == "structure"]
    assert steps == [[] if skip else ["d0", "d1", "s0", "s1", "s2"] for skip in skipped]


def test_controlnet_keeps_a_whole_network_from_being_one_call(v1):
    """The samples of this step are to be added on a hit too, so they must not disappear in the residual."""

    def add(step: int, call: dict[str, Any]) -> None:
        call["controlnet_block_samples"] = [torch.full((1, 16, 32), 0.1, dtype=torch.bfloat16)]

    calls: list[str] = []
    with asked_for(v1, lambda name, function, args: (calls.append(name), function(*args))[1]):
        with h2cache.apply(v1.transformer, BlockCacheConfig(threshold=-1)):
            v1.denoise(steps=1, before_step=add)
    assert Counter(calls) == {"forward_layer": 2, "forward_single_layer": 3}


# --- rotary embeddings ----------------------------------------------------------------------------------------------


@pytest.fixture
def packs(v1, monkeypatch) -> list[tuple]:
    """The shape of every table that is packed."""
    packed, original = [], type(v1.front).pack_rotemb

    def pack(table: Tensor) -> Tensor:
        packed.append(tuple(table.shape))
        return original(table)

    monkeypatch.setattr(type(v1.front), "pack_rotemb", staticmethod(pack))
    return packed


@every_method
def test_rotary_embeddings_are_packed_once_a_run(config, v1, packs):
    """Where the cache leads through the core's layers."""
    tables = [(1, 256, 8, 1, 2)] * 3  # image, text and both together, padded
    v1.denoise(steps=4)
    assert packs == 4 * tables, "nunchaku itself packs them at every step"
    packs.clear()
    with h2cache.apply(v1.transformer, config):
        v1.denoise()
        assert packs == tables
        v1.denoise(seed=1)
        assert packs == 2 * tables, "another run packs its own"
        packs.clear()
        v1.denoise(height=13, width=21)
        assert packs == [(1, 512, 8, 1, 2), (1, 256, 8, 1, 2), (1, 512, 8, 1, 2)]


@pytest.mark.parametrize("change", ["new-text-ids", "written-text-ids", "written-image-ids", "longer-text"])
def test_changed_positions_are_packed_again(change, v1, packs):
    """What a run keeps belongs to the very position ids that it was made from."""
    kept: dict[str, Tensor] = {}

    def before(step: int, call: dict[str, Any]) -> None:
        kept.setdefault("txt_ids", call["txt_ids"])
        call["txt_ids"] = kept["txt_ids"]
        if step != 3:
            return
        if change == "new-text-ids":
            kept["txt_ids"] = call["txt_ids"] = torch.full((6, 3), 5.0)
        elif change == "written-text-ids":
            call["txt_ids"] += 5
        elif change == "written-image-ids":
            call["img_ids"] *= 2
        else:
            call["txt_ids"] = torch.ones(9, 3)  # for this step: then the ones from before serve again
            call["encoder_hidden_states"] = torch.ones(1, 9, 24, dtype=torch.bfloat16)

    def run(*wear: h2cache.CacheConfig) -> Tensor:
        kept.clear()
        if not wear:
            return v1.denoise(steps=5, before_step=before)
        with h2cache.apply(v1.transformer, wear[0]):
            return v1.denoise(steps=5, before_step=before)

    untouched = run()
    packs.clear()
    assert torch.equal(run(H2CacheConfig(tau1=-1, tau2=-1)), untouched)
    assert len(packs) == 6


def test_a_table_that_follows_the_step_is_packed_at_every_step(v1, packs):
    """As that of embeddings which stretch positions while they denoise: the same position ids, another table."""
    plain = v1.transformer.pos_embed

    class Stretched(type(plain)):
        calls = 0

        def forward(self, ids: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(ids * (1 + self.calls / 10))

    v1.transformer.pos_embed = Stretched(plain.dim, plain.theta, plain.axes_dim)
    untouched = v1.denoise(steps=4)
    v1.transformer.pos_embed.calls = 0
    packs.clear()
    with h2cache.apply(v1.transformer, H2CacheConfig(tau1=-1, tau2=-1)):
        assert torch.equal(v1.denoise(steps=4), untouched)
    assert len(packs) == 4 * 3


def test_a_table_written_in_place_is_packed_again(v1):
    """That of a module which keeps one and changes it at every step, also in inference mode, which counts no writes."""
    steps: list[int] = []

    class Kept(type(v1.transformer.pos_embed)):
        def forward(self, ids: Tensor) -> Tensor:
            steps.append(1)
            if len(steps) == 1:
                self.table = super().forward(ids)
            self.table.mul_(0.9)
            return self.table

    plain = v1.transformer.pos_embed
    for mode in (torch.no_grad, torch.inference_mode):
        v1.transformer.pos_embed = Kept(plain.dim, plain.theta, plain.axes_dim)
        steps.clear()
        with mode():
            untouched = v1.denoise(steps=4)
            steps.clear()
            with h2cache.apply(v1.transformer, H2CacheConfig(tau1=-1, tau2=-1)):
                assert torch.equal(v1.denoise(steps=4), untouched)


@pytest.mark.parametrize("name", ["txt_ids", "img_ids"])
def test_ids_written_in_inference_mode_are_packed_again(name, v1):
    """It counts no writes, so that nothing is kept there."""

    def write(step: int, call: dict[str, Any]) -> None:
        call[name] += 1.0

    with torch.inference_mode():
        untouched = v1.denoise(steps=4, before_step=write)
        assert not torch.equal(untouched, v1.denoise(steps=4))
        with h2cache.apply(v1.transformer, H2CacheConfig(tau1=-1, tau2=-1)):
            assert torch.equal(v1.denoise(steps=4, before_step=write), untouched)


def test_packed_embeddings_count_as_held(v1):
    """Three tables of 256 x 16 numbers in float32, beside what diffusers' transformer makes the method hold, minus one
    (22, 16) table: of the positions as they are nunchaku has one, diffusers two."""
    held = []
    for model in (flux(), v1.transformer):
        with h2cache.apply(model, H2CacheConfig()) as handle:
            held += [handle.held_bytes() for _ in denoising(model, dtype=torch.bfloat16, steps=1)]
    assert held[1] - held[0] == (3 * 256 - 22) * 16 * 4


# --- the hot path ---------------------------------------------------------------------------------------------------

VIEWS = ("view", "slice", "as_strided", "split", "detach", "alias", "expand", "unsqueeze", "select")


class Operations(TorchDispatchMode):
    """Counts tensor operations by name, apart from those inside of what is `apart`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.silent = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if not self.silent and name not in VIEWS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))

    def apart(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        self.silent += 1
        try:
            return function(*args, **kwargs)
        finally:
            self.silent -= 1


def operations_of_hits(subject: Subject, config: h2cache.CacheConfig, monkeypatch, **options: Any) -> list[Counter]:
    """What is done between nunchaku's model and its core in every step that hits throughout, decisions apart."""
    counts: list[Counter[str]] = []
    mode, run_blocks = Operations(), NunchakuFluxV1._run_blocks

    def counted(*args: Any) -> Any:
        mode.counts.clear()
        with mode:
            output = run_blocks(*args)
        counts.append(Counter(mode.counts))
        return output

    monkeypatch.setattr(block_stage, "decide", lambda *args: mode.apart(decide, *args))
    monkeypatch.setattr(NunchakuFluxV1, "_run_blocks", counted)
    with asked_for(subject, lambda name, function, args: mode.apart(function, *args)):
        with h2cache.apply(subject.transformer, config) as handle:
            subject.denoise(**options)
    rows = list(handle.trace)
    hits = [step for step in range(len(counts)) if all(row.decision.skips for row in rows if row.step == step)]
    assert hits
    return [counts[step] for step in hits]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("config", "stages", "order"),
    [
        pytest.param(H2CacheConfig(tau1=9, tau2=9), 2, 0, id="h2"),
        pytest.param(H2CacheConfig(tau1=9, tau2=9, hierarchical=False), 2, 0, id="h2-flat"),
        pytest.param(H2CacheConfig(tau1=9, tau2=9, forecast="taylor"), 2, 1, id="h2-taylor"),
        pytest.param(BlockCacheConfig(threshold=9), 1, 0, id="block-cache"),
        pytest.param(TeaCacheConfig(threshold=9, coefficients=(1.0, 0.0)), 1, 0, id="teacache"),
        pytest.param(TaylorSeerConfig(interval=3, order=1, granularity="stage"), 2, 1, id="taylorseer"),
        pytest.param(HiCacheConfig(interval=3, order=2, granularity="stage"), 2, 2, id="hicache"),
    ],
)
def test_a_hit_only_adds_residuals(config, stages, order, batch, v1, monkeypatch):
    """For each stage and image: room for the sum, the sum of both streams and the residual, written where the core or
    the model takes it from, and one more in-place sum for each order. Nothing is copied, joined or converted."""
    for counts in operations_of_hits(v1, config, monkeypatch, batch=batch):
        orders = counts.pop("_foreach_add_", 0)
        assert counts.pop("new_empty") == stages
        assert counts == {"add": 2 * stages * batch}
        assert orders <= order * stages * batch


# --- PuLID, offloading, LoRA ----------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """In place of PuLID's: something of the tokens and of the identity, another at every layer."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, embeddings: Tensor, image: Tensor) -> Tensor:
        return torch.tanh(image.roll(self.number + 1, dims=2) * embeddings.mean(dim=1, keepdim=True))


def identify(subject: Subject, per_image: bool = False) -> Callable[[int, dict[str, Any]], None]:
    """Gives the model PuLID's cross-attentions, and every call an identity."""
    doubles, singles = subject.transformer.config.num_layers, subject.transformer.config.num_single_layers
    needed = -(-doubles // 2) + -(-singles // 4)
    subject.front.pulid_ca = nn.ModuleList(CrossAttention(number) for number in range(needed))

    def add(step: int, call: dict[str, Any]) -> None:
        images = len(call["hidden_states"]) if per_image else 1
        rows = [torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(image)) for image in range(images)]
        call.update(id_embeddings=torch.cat(rows).to(subject.dtype), id_weight=0.7)

    return add


@product(
    "config, double, single",
    STAGED,
    [pytest.param(double, single, id=f"{double}-{single}") for double, single in ((2, 3), (3, 5), (1, 1))],
    kept=lambda method, blocks: blocks == "3-5" or method in ONE_OF_EACH_SORT,
)
def test_pulid_without_hits_changes_no_bit(config, double, single, nunchaku):
    """The core asks for residuals only when it runs whole; layer by layer, they are added here, the same ones."""
    subject = standin(nunchaku, "v1", flux(double, single))
    options = dict(steps=3, before_step=identify(subject))
    untouched = subject.denoise(**options)
    assert not torch.equal(untouched, subject.denoise(steps=3))
    with h2cache.apply(subject.transformer, never_hitting(config)):
        assert torch.equal(subject.denoise(**options), untouched)
    assert subject.front.m._callback is None


@every_method
def test_pulid_gives_each_image_its_own_identity(config, v1):
    """In a batch of which some images are computed and some not, the identities stay with their images."""
    options = dict(before_step=identify(v1, per_image=True))
    with h2cache.apply(v1.transformer, config) as handle:
        batch = v1.denoise(batch=3, **options)
        rows = [row.decision for row in handle.trace if row.sample == 0]
        handle.trace.clear()
        image = v1.denoise(**options)
    assert rows == [row.decision for row in handle.trace]
    assert any(decision.skips for decision in rows)
    torch.testing.assert_close(batch[:1], image, rtol=0.05, atol=0.05)


def test_pulid_that_fails_leaves_no_callback_behind(v1):
    options = dict(before_step=identify(v1))
    v1.front.pulid_ca[1].forward = None
    with h2cache.apply(v1.transformer, BlockCacheConfig(threshold=-1)), pytest.raises(TypeError):
        v1.denoise(**options)
    assert v1.front.m._callback is None


def test_pulid_with_controlnet_is_computed_by_the_core_itself(v1):
    """It adds the samples first and asks for residuals of the sum, which blocks of which a stage is made cannot do."""
    add_identity = identify(v1)

    def add(step: int, call: dict[str, Any]) -> None:
        add_identity(step, call)
        call["controlnet_block_samples"] = [torch.full((1, 16, 32), 0.1, dtype=torch.bfloat16)]

    untouched = v1.denoise(before_step=add)
    with h2cache.apply(v1.transformer, H2CacheConfig(tau1=9, tau2=9)) as handle:
        assert torch.equal(v1.denoise(before_step=add), untouched)
    assert len(handle.trace) == 0


@every_method
def test_offloaded_layers_are_loaded_as_they_are_asked_for(config, nunchaku):
    model = flux()
    kept, offloaded = (standin(nunchaku, "v1", model, offload=offload) for offload in (False, True))
    with h2cache.apply(kept.transformer, config):
        expected = kept.denoise(batch=2)
    with h2cache.apply(offloaded.transformer, config):
        assert torch.equal(offloaded.denoise(batch=2), expected)
    assert offloaded.front.m._loaded == {("double", 0)}


def lora(rank: int = 2, around: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    layers = ["transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.proj_out"]
    layers += ["context_embedder"] if around else []
    sizes = {"proj_out": (160, 32), "context_embedder": (24, 32)}
    matrices = {}
    for layer in layers:
        wide, high = sizes.get(layer.rpartition(".")[2], (32, 32))
        for name, shape in (("lora_A", (rank, wide)), ("lora_B", (high, rank))):
            matrix = torch.randn(shape, generator=generator) * 0.3
            matrices[f"{layer}.{name}.weight"] = matrix.bfloat16()
    return matrices


@every_method
def test_a_lora_may_come_and_go_under_the_cache(config, nunchaku):
    """Loaded before or after, scaled or taken off: the next run is that of a cache put on a model with the same."""
    changes: dict[str, Callable[[nn.Module], None]] = {
        "loaded": lambda model: model.update_lora_params(lora()),
        "weaker": lambda model: model.set_lora_strength(0.4),
        "off": lambda model: model.reset_lora(),
    }
    worn, other = standin(nunchaku, "v1", flux()), standin(nunchaku, "v1", flux())
    with h2cache.apply(worn.transformer, config) as handle:
        images = [worn.denoise()]
        for change in changes.values():
            change(worn.transformer), change(other.transformer)
            images.append(worn.denoise())
            with h2cache.apply(other.transformer, config):
                assert torch.equal(other.denoise(), images[-1])
        assert any(row.decision.skips for row in handle.trace)
    assert torch.equal(images[0], images[3])
    assert all(not torch.equal(images[i], images[i + 1]) for i in range(3))


# --- what it takes to be one ----------------------------------------------------------------------------------------


def test_the_front_is_nunchaku_s_own_where_the_model_is_not_called(v1):
    """A caller that goes past the model gets what nunchaku computes, cache or not."""
    embedded = dict(
        hidden_states=torch.randn(1, 4, 32).bfloat16(),
        encoder_hidden_states=torch.randn(1, 4, 32).bfloat16(),
        temb=torch.randn(1, 32).bfloat16(),
        image_rotary_emb=v1.transformer.pos_embed(torch.zeros(8, 3)),
    )
    plain = v1.front(**embedded)
    with h2cache.apply(v1.transformer, H2CacheConfig()) as handle:
        for given, expected in zip(v1.front(**embedded), plain, strict=True):
            assert torch.equal(given, expected)
    assert len(handle.trace) == 0


def test_config_and_weights_that_disagree_are_refused(v1):
    v1.transformer._quantized_part_sd["single_transformer_blocks.3.qkv_proj.qweight"] = torch.empty(0)
    with pytest.raises(ValueError, match="2 double and 3 single blocks, but weights of 2 and 4 were loaded"):
        h2cache.apply(v1.transformer, H2CacheConfig())


def test_a_new_core_is_taken_up(v1, nunchaku):
    """`inject_quantized_module` under the cache: the layers are then those of the new core."""
    other = standin(nunchaku, "v1", flux(seed=5))
    with h2cache.apply(v1.transformer, H2CacheConfig(tau1=-1, tau2=-1)) as handle:
        v1.denoise(steps=2)
        v1.transformer.inject_quantized_module(other.front.m, "cpu")
        cached = v1.denoise(steps=2)
        assert handle.summary()["steps"] == 4
    assert torch.equal(v1.denoise(steps=2), cached)


def test_another_cache_s_blocks_are_refused(v1):
    v1.transformer.transformer_blocks = nn.ModuleList([nn.Identity()])
    with pytest.raises(TypeError, match="other caches"):
        h2cache.apply(v1.transformer, H2CacheConfig())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_of_another_dtype_are_converted_as_nunchaku_does(dtype, nunchaku):
    """A pipeline in float32 around a core in half precision."""
    subject = standin(nunchaku, "v1", flux(dtype=dtype))
    subject.transformer.to(torch.float32)
    untouched = denoise(subject.transformer, steps=4)
    for config in (H2CacheConfig(tau1=-1, tau2=-1), BlockCacheConfig(threshold=-1)):
        with h2cache.apply(subject.transformer, config):
            assert torch.equal(denoise(subject.transformer, steps=4), untouched)


def test_generations_are_told_apart_by_name(nunchaku):
    """And nothing of the package is imported for it."""
    model = flux()
    adapters = [adapter_of(standin(nunchaku, generation, model).transformer) for generation in ("v1", "v2")]
    assert [type(adapter) for adapter in adapters] == [NunchakuFluxV1, NunchakuFluxV2]
    assert type(adapter_of(model)) is FluxAdapter
    assert "nunchaku" not in sys.modules or sys.modules["nunchaku"] is not nunchaku
