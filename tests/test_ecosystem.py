"""Rule 5: the cache works with what else people do to a Flux pipeline, put on before it or after it."""

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import (
    EARLY,
    KINDS,
    METHODS,
    MODULES,
    every_method_once,
    has_clusters,
    measures,
    never_hitting,
    runs_first_block,
    skips_model,
    skips_modules,
)
from diffusers import FlowMatchHeunDiscreteScheduler, FluxPipeline
from diffusers.hooks import apply_group_offloading, group_offloading
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from loops import attentions, blocks_of, denoise, denoising, position_ids
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pictures import alone, is_mixed, own_pipeline, picture
from tiny import tiny_transformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import h2cache

every_method = pytest.mark.parametrize("config", METHODS)
before_or_after = pytest.mark.parametrize("when", ["before", "after"])
every_method_before_or_after = every_method_once("when", {"before": "before", "after": "after"}, most="after")

CPU = torch.device("cpu")


@pytest.fixture
def own_pipe(tiny_pipe) -> FluxPipeline:
    """A pipeline with a transformer to spoil."""
    return own_pipeline(tiny_pipe, transformer=copy.deepcopy(tiny_pipe.transformer))


@contextmanager
def cached(model: Any, config: h2cache.CacheConfig, when: str, change: Callable[[], Any]):
    """The model with a cache and with a change, made before the cache is applied or (after a first run) afterwards."""
    if when == "before":
        change()
        with h2cache.apply(model, config) as handle:
            yield handle
    else:
        with h2cache.apply(model, config) as handle:
            picture(model, steps=3) if isinstance(model, FluxPipeline) else denoise(model, steps=3)
            handle.trace.clear()
            change()
            yield handle


# --- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory):
    """Weights of a LoRA that shows, as a file that pipelines load."""
    transformer = tiny_transformer()
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "add_k_proj", "proj_mlp", "proj_out"]
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    layers = {name: 0.5 * value for name, value in get_peft_model_state_dict(transformer).items()}
    folder = tmp_path_factory.mktemp("lora")
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


@every_method_before_or_after
def test_lora(config, when, own_pipe, lora_folder):
    """Loaded, weighed, unloaded: each picture is that of a pipeline that never was in another state."""
    fresh = own_pipeline(own_pipe, transformer=copy.deepcopy(own_pipe.transformer))
    without = alone(fresh, config)
    fresh.load_lora_weights(lora_folder)
    plain_with = picture(fresh)
    with_lora = alone(fresh, config)
    half = alone(fresh, config, joint_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(with_lora, without, atol=0.05) and not torch.equal(with_lora, plain_with)

    with cached(own_pipe, config, when, lambda: own_pipe.load_lora_weights(lora_folder)) as handle:
        assert torch.equal(picture(own_pipe), with_lora)
        assert is_mixed(handle)
        assert torch.equal(picture(own_pipe, joint_attention_kwargs={"scale": 0.5}), half)
        own_pipe.unload_lora_weights()
        assert torch.equal(picture(own_pipe), without)
        own_pipe.load_lora_weights(lora_folder)
        assert torch.equal(picture(own_pipe), with_lora)
    assert torch.equal(picture(own_pipe), plain_with)


@pytest.mark.parametrize("target", ["to_q", "net.2", "norm1.linear", "proj_mlp", "proj_out"])
@pytest.mark.parametrize("config", MODULES + EARLY)
def test_a_lora_of_one_kind_of_layer(config, target, transformer):
    """PEFT puts another module in the layer's place: the one that a method answers for, one that only feeds it, or a
    part of one."""

    def load(model: nn.Module) -> None:
        torch.manual_seed(7)
        model.add_adapter(LoraConfig(r=2, target_modules=[target], init_lora_weights=False))

    fresh = tiny_transformer()
    load(fresh)
    with h2cache.apply(transformer, config):
        without = denoise(transformer)
        with h2cache.apply(fresh, config):
            with_lora = denoise(fresh)
        load(transformer)
        assert torch.equal(denoise(transformer), with_lora)
        transformer.unload_lora()
        assert torch.equal(denoise(transformer), without)
    assert not torch.allclose(with_lora, without, atol=0.05)


def test_lora_hotswap_can_be_prepared_while_a_cache_is_applied(own_pipe, lora_folder):
    """PEFT asks whether the model is compiled, by the slot that the cache sits in; it is not."""
    with h2cache.apply(own_pipe, METHODS[0].values[0]):
        own_pipe.enable_lora_hotswap(target_rank=8)
        own_pipe.load_lora_weights(lora_folder)
        picture(own_pipe, steps=2)


# --- IP-Adapter -----------------------------------------------------------------------------------------------------


def with_image_prompts(transformer: nn.Module) -> nn.Module:
    """IP-Adapter's attention in every double block."""
    torch.manual_seed(1)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 20, num_tokens=(4,), scale=0.8))
    return transformer.double().eval()


def image_prompt(seed: int, batch: int) -> list[Tensor]:
    return [
        torch.cat([torch.randn(1, 1, 4, 20, generator=torch.Generator().manual_seed(seed + k)) for k in range(batch)])
        .double()
        .squeeze(1)
    ]


@every_method
def test_ip_adapter(config, transformer):
    """Each image of a batch keeps its own image prompt, also where only some of the batch are computed."""
    with_image_prompts(transformer)

    def run(seed: int, batch: int) -> Tensor:
        prompts = {"ip_hidden_states": image_prompt(100 + seed, batch)}
        return denoise(
            transformer, seed=seed, batch=batch, steps=18, dtype=torch.float64, joint_attention_kwargs=prompts
        )

    plain = run(0, 3)
    with h2cache.apply(transformer, never_hitting(config)):
        assert torch.equal(run(0, 3), plain)
    with h2cache.apply(transformer, config) as handle, attentions(transformer) as calls:
        together = run(0, 3)
        assert is_mixed(handle) and any(0 < rows < 3 for call in calls for rows in call) == measures(config)
        for sample in range(3):
            torch.testing.assert_close(together[sample], run(sample, 1)[0], rtol=1e-9, atol=1e-9)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_method
def test_dtypes(config, dtype, transformer):
    transformer.to(dtype)
    plain = denoise(transformer, batch=2, dtype=dtype)
    with h2cache.apply(transformer, never_hitting(config)):
        assert torch.equal(denoise(transformer, batch=2, dtype=dtype), plain)
    with h2cache.apply(transformer, config) as handle:
        latents = denoise(transformer, batch=2, dtype=dtype)
        assert torch.equal(denoise(transformer, batch=2, dtype=dtype), latents)
    assert latents.dtype == dtype and latents.isfinite().all()
    assert is_mixed(handle)
    assert handle.summary()["runs"] == 2


@every_method
def test_autocast(config, transformer):
    """Blocks may then return another dtype than they were given."""
    with torch.autocast("cpu", torch.bfloat16):
        plain = denoise(transformer, batch=3)
        with h2cache.apply(transformer, never_hitting(config)):
            assert torch.equal(denoise(transformer, batch=3), plain)
        with h2cache.apply(transformer, config) as handle:
            assert denoise(transformer, batch=3, steps=16).isfinite().all()
    assert is_mixed(handle)


# --- offloading -----------------------------------------------------------------------------------------------------
# Here without an accelerator, so the hooks are attached directly and compute on the CPU. What they do to a module is
# the same: they replace its forward, move its weights when it is called, and move its arguments.

OFFLOADS: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda model: cpu_offload_with_hook(model, CPU),
    "sequential": lambda model: cpu_offload(model, CPU, offload_buffers=True),
    "blocks-by-one": lambda model: apply_group_offloading(
        model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "blocks-by-two": lambda model: apply_group_offloading(
        model, CPU, CPU, offload_type="block_level", num_blocks_per_group=2
    ),
    "leaves": lambda model: apply_group_offloading(model, CPU, CPU, offload_type="leaf_level"),
}


WHENS = ("before", "after")
OFFLOADED_WHEN = {f"{name}-after": (offload, "after") for name, offload in OFFLOADS.items()}
OFFLOADED_WHEN |= {f"{name}-before": (OFFLOADS[name], "before") for name in ("model", "sequential")}


@every_method_once("case", OFFLOADED_WHEN, most="sequential-after")
def test_offloading(config, case, own_pipe):
    offload, when = case
    prompts, options = ["a red stop sign", "a label"], dict(steps=8)
    plain = picture(own_pipe, prompts, **options)
    expected = alone(own_pipe, config, prompts, **options)
    with cached(own_pipe, config, when, lambda: offload(own_pipe.transformer)) as handle:
        for _ in range(2):
            assert torch.equal(picture(own_pipe, prompts, **options), expected)
        assert is_mixed(handle)
    assert torch.equal(picture(own_pipe, prompts, **options), plain)


class Stream:
    """What group offloading needs of a CUDA stream: copies that nobody waited for have not arrived."""

    def __init__(self) -> None:
        self.under_way: list[Callable[[], Any]] = []

    def synchronize(self) -> None:
        while self.under_way:
            self.under_way.pop()()


OFFLOADED = torch.device("meta")


@pytest.fixture
def streams(monkeypatch):
    """Group offloading with prefetching streams, where an offloaded weight is on the meta device and cannot compute."""
    group = group_offloading.ModuleGroup
    owners: dict[int, tuple[nn.Module, str]] = {}

    def place(self: Any, offloaded: bool) -> None:
        if not hasattr(self, "weights"):
            inner = [parameter for module in self.modules for parameter in module.parameters()]
            self.weights = [(*owners[id(parameter)], parameter) for parameter in [*inner, *self.parameters]]
            self.apart = [owners[id(parameter)] for parameter in self.parameters]
        for module, name, parameter in self.weights:
            arrived = partial(module._parameters.__setitem__, name, parameter)
            if offloaded:
                module._parameters[name] = frozen(torch.empty_like(parameter, device=OFFLOADED))
            elif self.stream is None or not self.non_blocking:
                arrived()
            else:
                module._parameters[name] = frozen(torch.full_like(parameter, math.nan))
                self.stream.under_way.append(arrived)
        self.parameters = [module._parameters[name] for module, name in self.apart]

    def fetch(self: Any) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        place(self, offloaded=False)

    frozen = partial(nn.Parameter, requires_grad=False)
    monkeypatch.setattr(group, "_init_cpu_param_dict", lambda self: {})
    monkeypatch.setattr(group, "offload_", lambda self: place(self, offloaded=True))
    monkeypatch.setattr(group, "onload_", fetch)

    def attach(model: nn.Module, offload_type: str) -> None:
        for module in model.modules():
            owners.update({id(parameter): (module, name) for name, parameter in module._parameters.items()})
        group_offloading._apply_group_offloading(
            model,
            group_offloading.GroupOffloadingConfig(
                onload_device=CPU,
                offload_device=OFFLOADED,
                offload_type=group_offloading.GroupOffloadingType(offload_type),
                non_blocking=True,
                record_stream=False,
                low_cpu_mem_usage=False,
                num_blocks_per_group=1,
                stream=Stream(),
            ),
        )

    return attach


def onloaded_layers(model: nn.Module) -> list[int]:
    """For each block the number of layers whose weights are there to compute."""
    return [
        sum(
            any(weight.device != OFFLOADED for weight in layer._parameters.values() if weight is not None)
            for layer in block.modules()
        )
        for block in blocks_of(model)
    ]


PREFETCHED_WHEN = {f"{level}-{when}": (level, when) for level in ("block", "leaf") for when in WHENS}


@every_method_once("case", PREFETCHED_WHEN, most="leaf-after")
def test_group_offloading_with_prefetch(config, case, own_pipe, streams):
    """A skipped block is prefetched by the one before it and never comes to be offloaded; the block after the gap is
    prefetched by nobody. The second must be noticed, and of the first no more than one a stage may stay. Where layers
    come one by one and modules are skipped inside blocks, it is one layer of each block. The last step is a skipped one
    for the methods with a schedule."""
    level, when = case
    prompts, transformer = ["a red stop sign", "a label"], own_pipe.transformer
    plain = picture(own_pipe, prompts, steps=13)
    expected = alone(own_pipe, config, prompts, steps=13)
    with cached(own_pipe, config, when, lambda: streams(transformer, f"{level}_level")) as handle:
        for _ in range(2):
            assert torch.equal(picture(own_pipe, prompts, steps=13), expected)
            layers = onloaded_layers(transformer)
            if level == "leaf" and skips_modules(config):
                assert max(layers) == 1
            else:
                assert sum(number > 0 for number in layers) <= len(config.compose())
        assert is_mixed(handle)
    assert torch.equal(picture(own_pipe, prompts, steps=13), plain)
    assert onloaded_layers(transformer) == [0] * 5


# --- compiling ------------------------------------------------------------------------------------------------------


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
    pytest.param(method.values[0], when, id=f"{method.id}-{when}")
    for methods, whens in ((KINDS[:1] + MODULES[-1:], ["before", "after"]), (METHODS[-1:] + EARLY, ["after"]))
    for method in methods
    for when in whens
]


@pytest.mark.parametrize(("config", "when"), COMPILED)
def test_compiled_blocks(config, when, transformer, graphs):
    """The blocks are compiled and the decisions are not: the same images, and later steps compile nothing again."""
    requests = [dict(), dict(batch=3), dict(batch=3, seed=5), dict()]
    with h2cache.apply(transformer, config):
        expected = [denoise(transformer, steps=20, **request) for request in requests]

    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    change = partial(transformer.compile_repeated_blocks, backend=counter, fullgraph=True)
    with cached(transformer, config, when, change) as handle:
        for request, latents in zip(requests, expected, strict=True):
            torch.testing.assert_close(denoise(transformer, steps=20, **request), latents, rtol=1e-4, atol=1e-4)
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
        expected = denoise(transformer)
    torch._dynamo.reset()

    def compile_blocks() -> None:
        for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            for index, block in enumerate(blocks):
                blocks[index] = torch.compile(block, backend="eager")

    with cached(transformer, config, when, compile_blocks) as handle:
        torch.testing.assert_close(denoise(transformer), expected)
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


# --- schedulers, gradients, hooks -----------------------------------------------------------------------------------


@every_method
def test_scheduler_that_calls_twice_a_step(config, transformer):
    """Heun evaluates every later timestep twice, which is no new run."""

    def run(steps: int = 10, seed: int = 0) -> Tensor:
        scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        generator, ids = torch.Generator().manual_seed(seed), position_ids(4, 4)
        latents = torch.randn(1, 16, 16, generator=generator)
        prompt, pooled = torch.randn(1, 6, 24, generator=generator), torch.randn(1, 16, generator=generator)
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                velocity = transformer(
                    hidden_states=latents,
                    encoder_hidden_states=prompt,
                    pooled_projections=pooled,
                    timestep=timestep.expand(1) / 1000,
                    img_ids=ids,
                    txt_ids=torch.zeros(6, 3),
                    guidance=torch.full((1,), 3.5),
                    return_dict=False,
                )[0]
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    expected = []
    for steps in (10, 4, 1):
        with h2cache.apply(transformer, config) as handle:
            expected.append(run(steps))
            assert handle.summary()["runs"] == 1
            assert handle.summary()["steps"] == 2 * steps - 1
            assert steps < 10 or is_mixed(handle)
    with h2cache.apply(transformer, config):
        for _ in range(2):
            for steps, latents in zip((10, 4, 1), expected, strict=True):
                assert torch.equal(run(steps), latents)


def call_with_gradients(transformer: nn.Module) -> Callable[[Tensor, float], Tensor]:
    """A call of the model with fixed prompt and position ids, outside of `torch.no_grad`."""
    ids, generator = position_ids(4, 4), torch.Generator().manual_seed(0)
    prompt, pooled = torch.randn(1, 6, 24, generator=generator), torch.randn(1, 16, generator=generator)

    def call(latents: Tensor, time: float) -> Tensor:
        return transformer(
            hidden_states=latents,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=torch.tensor([time]),
            img_ids=ids,
            txt_ids=torch.zeros(6, 3),
            guidance=torch.full((1,), 3.5),
            return_dict=False,
        )[0]

    return call


@every_method
def test_gradients_at_every_step(config, transformer):
    """As in guidance by a loss: each step's graph is its own and goes with it, though a residual outlives its step.
    Where the model is skipped there is no graph: what is returned then does not depend on the step's latents."""
    transformer.requires_grad_(False)

    def run() -> Tensor:
        call = call_with_gradients(transformer)
        latents = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))
        for step in range(12):
            latents = latents.detach().requires_grad_()
            velocity = call(latents, 1 - step / 12)
            if not velocity.requires_grad:
                without_graph.append(step)
                latents = latents.detach() - velocity / 12
                continue
            velocity.square().mean().backward()
            assert latents.grad.abs().sum() > 0
            latents = latents.detach() - velocity.detach() / 12 - 0.01 * latents.grad
        return latents

    without_graph: list[int] = []
    plain = run()
    with h2cache.apply(transformer, never_hitting(config)):
        assert torch.equal(run(), plain)
    assert without_graph == []
    with h2cache.apply(transformer, config) as handle:
        run()
    assert is_mixed(handle)
    skipped = [row.step for row in handle.trace if row.decision.skips]
    assert without_graph == (skipped if skips_model(config) else [])


@every_method
def test_gradient_checkpointing(config, transformer):
    """Blocks are then called by position through torch.utils.checkpoint."""
    with h2cache.apply(transformer, config):
        expected = denoise(transformer)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    with h2cache.apply(transformer, config) as handle:
        assert torch.equal(denoise(transformer), expected)
        handle.trace.clear()
        call = call_with_gradients(transformer)
        latents = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))
        for step in range(12):
            latents = (latents - call(latents, 1 - step / 12) / 12).detach()
        assert is_mixed(handle)


@before_or_after
@every_method
def test_forward_hooks_see_what_is_computed(config, when, transformer):
    """Those on blocks, and of methods that skip inside blocks, those on what is skipped there."""
    seen, inside = [0] * 5, [0] * 5

    def count(numbers: list[int], index: int) -> Callable[..., None]:
        return lambda *_: numbers.__setitem__(index, numbers[index] + 1)

    def register() -> None:
        for index, block in enumerate(blocks_of(transformer)):
            block.register_forward_hook(count(seen, index))
            block.attn.register_forward_hook(count(inside, index))

    with cached(transformer, config, when, register) as handle:
        denoise(transformer, steps=16)
        assert is_mixed(handle)
    assert sum(inside) == sum(row.blocks_computed for row in handle.trace)
    if skips_modules(config):
        assert seen == [16] * 5 and 0 < inside[0] < 16
    else:
        assert seen == inside and 0 < seen[1] < 16
        assert (seen[0] == 16) == runs_first_block(config)


@every_method
def test_hooks_that_change_what_blocks_return(config, transformer):
    """What a user's hook makes of a block is the block, for reference and residual alike."""
    for block in blocks_of(transformer):
        block.register_forward_hook(lambda module, args, output: tuple(1.1 * stream for stream in output))
    plain = denoise(transformer)
    with h2cache.apply(transformer, never_hitting(config)):
        assert torch.equal(denoise(transformer), plain)
    with h2cache.apply(transformer, config):
        assert not torch.equal(denoise(transformer), plain)


@every_method
def test_fused_projections(config, own_pipe):
    """Attention modules change under the cache's feet, blocks do not."""
    with h2cache.apply(own_pipe, never_hitting(config)):
        before = picture(own_pipe)
        own_pipe.transformer.fuse_qkv_projections()
        torch.testing.assert_close(picture(own_pipe), before, rtol=1e-3, atol=1e-3)
        own_pipe.transformer.unfuse_qkv_projections()
        assert torch.equal(picture(own_pipe), before)


@every_method
def test_inference_mode(config, transformer):
    with h2cache.apply(transformer, config):
        expected = denoise(transformer, batch=2)
        with torch.inference_mode():
            assert torch.equal(denoise(transformer, batch=2), expected)
        assert torch.equal(denoise(transformer, batch=2), expected)


@every_method
def test_no_warnings(config, transformer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with h2cache.apply(transformer, config):
            for _ in denoising(transformer, batch=3):
                pass
