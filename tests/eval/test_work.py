"""Work is counted where it is done: exactly for one call, in proportion for a run, and nothing of it remains."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from families import FAMILIES, family_named
from families.base import family_pipe, generate
from thorough import named, product
from tiny import tiny_transformer
from torch.utils.flop_counter import FlopCounterMode

import h2cache
from h2cache import H2CacheConfig
from h2cache.baselines import TaylorSeerConfig
from h2cache.eval.generation.work import WorkCounter

CALL = {"height": 32, "width": 32, "num_inference_steps": 6, "max_sequence_length": 24, "output_type": "latent"}


class Pipe:
    """What the counter needs of a pipeline."""

    def __init__(self, **parts: torch.nn.Module):
        self.__dict__ |= parts


def u_net() -> tuple[UNet2DConditionModel, object]:
    made = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    return made, lambda: made(torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.randn(2, 7, 8))


@torch.no_grad()
def test_it_counts_what_torch_counts_in_a_u_net():
    model, call = u_net()
    with WorkCounter(Pipe(unet=model)) as work, FlopCounterMode(display=False) as flops:
        call()
    assert work.calls == 1
    assert 2 * work.multiply_adds == flops.get_total_flops()


@torch.no_grad()
def test_it_counts_what_torch_counts_in_a_transformer():
    model = tiny_transformer(double=2, single=3).eval()
    channels = model.config.in_channels
    call = dict(
        hidden_states=torch.randn(2, 30, channels),
        encoder_hidden_states=torch.randn(2, 7, model.config.joint_attention_dim),
        pooled_projections=torch.randn(2, model.config.pooled_projection_dim),
        timestep=torch.full((2,), 0.5),
        img_ids=torch.zeros(30, 3),
        txt_ids=torch.zeros(7, 3),
    )
    if model.config.guidance_embeds:
        call["guidance"] = torch.ones(2)
    with WorkCounter(Pipe(transformer=model)) as work, FlopCounterMode(display=False) as flops:
        model(**call)
    assert 2 * work.multiply_adds == flops.get_total_flops()


def _counting(flops: list[int], compute: Callable) -> Callable:
    def forward(*args, **kwargs):
        with FlopCounterMode(display=False) as counted:
            output = compute(*args, **kwargs)
        flops.append(counted.get_total_flops())
        return output

    return forward


@torch.no_grad()
@product("family", named({family.name: family for family in FAMILIES}), kept=("flux2", "sana", "wan-a14b").__contains__)
def test_it_counts_what_torch_counts_in_every_family(family, monkeypatch):
    pipe, flops = family_pipe(family.name), []
    for denoiser in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if denoiser is not None:  # these alone: the pipelines' encoders compute as well
            monkeypatch.setattr(denoiser, "forward", _counting(flops, denoiser.forward))
    with WorkCounter(pipe) as work:
        generate(family, pipe)
    assert work.calls == len(flops) > 0
    assert 2 * work.multiply_adds == sum(flops)


@pytest.mark.parametrize("name", ["flux", "wan", "wan-i2v"])
def test_fused_projections_count_as_separate_ones(name, monkeypatch):
    family, pipe, counts = family_named(name), family_pipe(name), []
    fused = copy.deepcopy(pipe.transformer)
    for module in fused.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()
    for transformer in (pipe.transformer, fused):
        monkeypatch.setattr(pipe, "transformer", transformer)
        with WorkCounter(pipe) as work:
            generate(family, pipe)
        counts.append(work.multiply_adds)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "config",
    [H2CacheConfig(tau1=9, tau2=9), TaylorSeerConfig(3, first_enhance=1), TaylorSeerConfig(3, granularity="stage")],
)
def test_what_a_cache_skips_is_not_counted(tiny_pipe, config):
    def draw() -> None:
        tiny_pipe("a sign", generator=torch.manual_seed(0), **CALL)

    with WorkCounter(tiny_pipe) as plain:
        draw()
    with WorkCounter(tiny_pipe) as cached, h2cache.apply(tiny_pipe, config):
        draw()
    assert cached.calls == plain.calls == 6
    assert plain.multiply_adds % 6 == 0
    assert plain.multiply_adds / 6 < cached.multiply_adds < 0.8 * plain.multiply_adds


def test_nothing_of_it_remains(tiny_pipe):
    before = {name: dict(vars(module)) for name, module in tiny_pipe.transformer.named_modules()}
    with WorkCounter(tiny_pipe):
        pass
    after = {name: dict(vars(module)) for name, module in tiny_pipe.transformer.named_modules()}
    assert [name for name in before if before[name].keys() != after[name].keys()] == []
    assert not tiny_pipe.transformer._forward_pre_hooks
