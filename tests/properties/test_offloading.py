"""Rule 5: weights that wait elsewhere until they are needed, put there before the cache or after it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading, group_offloading
from loops import blocks_of
from methods_under_test import (
    every_method_once,
    skips_modules,
)
from pictures import alone, cached, is_mixed, picture
from torch import nn

CPU = torch.device("cpu")

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
