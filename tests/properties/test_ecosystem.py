"""Rule 5: the cache works with what else people do to a Flux pipeline, put on before it or after it."""

import copy
import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from loops import attentions, blocks_of, denoise, denoising, position_ids
from methods_under_test import (
    EARLY,
    METHODS,
    MODULES,
    every_method,
    every_method_once,
    measures,
    never_hitting,
    runs_first_block,
    skips_modules,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pictures import alone, cached, is_mixed, own_pipeline, picture
from tiny import tiny_transformer
from torch import Tensor, nn

import h2cache

before_or_after = pytest.mark.parametrize("when", ["before", "after"])
every_method_before_or_after = every_method_once("when", {"before": "before", "after": "after"}, most="after")

CPU = torch.device("cpu")


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


def with_an_image_each(transformer: nn.Module, seed: int, batch: int) -> Tensor:
    prompts = {"ip_hidden_states": image_prompt(100 + seed, batch)}
    return denoise(transformer, seed=seed, batch=batch, steps=18, dtype=torch.float64, joint_attention_kwargs=prompts)


@pytest.fixture(scope="module")
def three_images() -> Tensor:
    """What the model makes without a cache."""
    return with_an_image_each(with_image_prompts(tiny_transformer()), 0, 3)


@every_method
def test_ip_adapter(config, transformer, three_images):
    """Each image of a batch keeps its own image prompt, also where only some of the batch are computed."""
    with_image_prompts(transformer)
    with h2cache.apply(transformer, never_hitting(config)):
        assert torch.equal(with_an_image_each(transformer, 0, 3), three_images)
    with h2cache.apply(transformer, config) as handle, attentions(transformer) as calls:
        together = with_an_image_each(transformer, 0, 3)
        assert is_mixed(handle) and any(0 < rows < 3 for call in calls for rows in call) == measures(config)
        for sample in range(3):
            alone = with_an_image_each(transformer, sample, 1)
            torch.testing.assert_close(together[sample], alone[0], rtol=1e-9, atol=1e-9)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@cache
def uncached(dtype: torch.dtype) -> Tensor:
    return denoise(tiny_transformer().to(dtype), batch=2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)  # the other tests are in float32
@every_method
def test_dtypes(config, dtype, transformer):
    transformer.to(dtype)
    with h2cache.apply(transformer, never_hitting(config)):
        assert torch.equal(denoise(transformer, batch=2, dtype=dtype), uncached(dtype))
    with h2cache.apply(transformer, config) as handle:
        latents = denoise(transformer, batch=2, dtype=dtype)
        assert torch.equal(denoise(transformer, batch=2, dtype=dtype), latents)
    assert latents.dtype == dtype and latents.isfinite().all()
    assert is_mixed(handle)
    assert handle.summary()["runs"] == 2


@pytest.fixture(scope="module")
def under_autocast() -> Tensor:
    """What the model makes without a cache."""
    with torch.autocast("cpu", torch.bfloat16):
        return denoise(tiny_transformer(), batch=3)


@every_method
def test_autocast(config, transformer, under_autocast):
    """Blocks may then return another dtype than they were given."""
    with torch.autocast("cpu", torch.bfloat16):
        with h2cache.apply(transformer, never_hitting(config)):
            assert torch.equal(denoise(transformer, batch=3), under_autocast)
        with h2cache.apply(transformer, config) as handle:
            assert denoise(transformer, batch=3, steps=11).isfinite().all()
    assert is_mixed(handle)


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
    assert without_graph == []


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
        denoise(transformer)
        assert is_mixed(handle)
    assert sum(inside) == sum(row.blocks_computed for row in handle.trace)
    if skips_modules(config):
        assert seen == [8] * 5 and 0 < inside[0] < 8
    else:
        assert seen == inside and 0 < seen[1] < 8
        assert (seen[0] == 8) == runs_first_block(config)


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
