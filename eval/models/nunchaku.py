"""FLUX.1 in 4 bits: nunchaku's own two generations, and the checkpoints that diffusers loads by itself.

Nothing here imports nunchaku before `h2cache.eval.models.diagnosis` has said that it is there and can run. The
interfaces are those of nunchaku 1.2; docs/nunchaku.md says what of this has been run on a real GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.utils.constants import DIFFUSERS_TRUST_REMOTE_KERNELS

from h2cache.eval.errors import UserError
from h2cache.eval.models.diagnosis import (
    TURING,
    describe_gpu,
    engine_attribute,
    find_installation,
    quiet,
    require_cuda,
    require_gpu,
    require_package,
)
from h2cache.eval.models.explained import explained
from h2cache.eval.models.loading import Component, OnBytes, unwatched
from h2cache.eval.models.pipelines import DTYPES, ModelConfig, assemble, is_number, require, resolve_device

ATTENTIONS = ("auto", "flashattn2", "nunchaku-fp16")
PRECISION = "{precision}"  # where a file's name has it


class Generation(Protocol):
    """One of nunchaku's two implementations of the Flux transformer."""

    module: str
    name: str
    offloads: tuple[str, ...]
    takes_lora: bool

    @staticmethod
    def set_attention(transformer: FluxTransformer2DModel, name: str) -> None: ...


class V1:
    """The whole network in C++. Offloads layer by layer, and adds a LoRA to its low-rank branch."""

    module, name = "nunchaku", "NunchakuFluxTransformer2dModel"
    offloads = ("none", "sequential")
    takes_lora = True

    @staticmethod
    def set_attention(transformer: FluxTransformer2DModel, name: str) -> None:
        transformer.set_attention_impl(name)


class V2:
    """Python blocks with quantized linear layers. Keeps its weights on the GPU; releases up to 1.2.1 have no LoRA."""

    module, name = "nunchaku.models.transformers.transformer_flux_v2", "NunchakuFluxTransformer2DModelV2"
    offloads = ("none",)
    takes_lora = False

    @staticmethod
    def set_attention(transformer: FluxTransformer2DModel, name: str) -> None:
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.attn.set_processor(name)


GENERATIONS: dict[str, type[Generation]] = {"v1": V1, "v2": V2}


@dataclass(frozen=True)
class NunchakuModelConfig(ModelConfig):
    """A pipeline with nunchaku's transformer; configs/model/nunchaku-flux1-dev.yaml says what each field means."""

    generation: str
    weights: str
    precision: str
    text_encoder_2: str | None
    attention: str
    lora: str | None
    lora_strength: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dtype != "float32", "dtype", self.dtype, "bfloat16 or float16: the kernels know no other")
        require(self.generation in GENERATIONS, "generation", self.generation, f"one of {', '.join(GENERATIONS)}")
        require(self.precision in ("auto", "int4", "fp4"), "precision", self.precision, "auto, int4 or fp4")
        require(self.attention in ATTENTIONS, "attention", self.attention, f"one of {', '.join(ATTENTIONS)}")
        is_file = isinstance(self.weights, str) and self.weights.endswith((".safetensors", ".sft"))
        require(is_file, "weights", self.weights, "a .safetensors file, or owner/name/file.safetensors on the hub")
        require(is_number(self.lora_strength), "lora_strength", self.lora_strength, "a number")
        generation = GENERATIONS[self.generation]
        offloads = f"{' or '.join(generation.offloads)} with generation={self.generation}" + (
            "" if len(generation.offloads) > 1 else ", which keeps its weights on the GPU; generation=v1 can offload"
        )
        require(self.offload in generation.offloads, "offload", self.offload, offloads)
        with_lora = (
            f"null with generation={self.generation}, which has no LoRA in nunchaku's releases; use generation=v1"
        )
        require(generation.takes_lora or not self.lora, "lora", self.lora, with_lora)

    @property
    def hub_files(self) -> tuple[str, ...]:
        files = (self._weights_file(), self.text_encoder_2, self.lora)
        return (*(file for file in files if file and not Path(file).expanduser().exists()), *super().hub_files)

    @property
    def memory_advice(self) -> str:
        advice = "a smaller model.height and model.width"
        if not self.text_encoder_2:
            advice = f"model.text_encoder_2=nunchaku-tech/nunchaku-t5/awq-int4-flux.1-t5xxl.safetensors, or {advice}"
        if self.offload == "none":
            advice = f"model.generation=v1 model.offload=sequential, or {advice}"
        return f"use {advice}"

    def check(self) -> None:
        device = _device_of(self)
        capability = require_gpu(device)
        super().check()
        require_package(find_installation())
        engine_attribute(GENERATIONS[self.generation].module, GENERATIONS[self.generation].name)
        if capability == TURING and self.dtype == "bfloat16":
            raise UserError(f"model.dtype=bfloat16: on {describe_gpu(device)} nunchaku needs model.dtype=float16")
        if capability == TURING and self.attention == "flashattn2":
            raise UserError(
                f"model.attention=flashattn2: {describe_gpu(device)} needs model.attention=nunchaku-fp16 (or auto)"
            )
        self._check_precision(device)

    def load(self, on_bytes: OnBytes = unwatched) -> FluxPipeline:
        device, generation, dtype = resolve_device(self), GENERATIONS[self.generation], DTYPES[self.dtype]
        model = engine_attribute(generation.module, generation.name)
        placing = {"device": device, "torch_dtype": dtype}
        weights = self._weights_file()
        with quiet(), explained(weights, "nunchaku's weights of a Flux transformer", "weights"):
            transformer = model.from_pretrained(weights, offload=self.offload != "none", **placing)
            generation.set_attention(transformer, self._attention_on(device))
        components: dict[str, Any] = {"transformer": transformer}
        if self.lora:
            with quiet(), explained(self.lora, "a LoRA", "lora"):
                transformer.update_lora_params(_user_path(self.lora))
                transformer.set_lora_strength(self.lora_strength)
        if self.text_encoder_2:
            encoder = engine_attribute("nunchaku", "NunchakuT5EncoderModel")
            with quiet(), explained(self.text_encoder_2, "nunchaku's T5 encoder", "text_encoder_2"):
                components["text_encoder_2"] = encoder.from_pretrained(_user_path(self.text_encoder_2), **placing)
        # nunchaku has loaded them, from files that it finds itself: no bytes of theirs are waited for.
        ready = {name: Component(0, lambda made=made: made, placed=True) for name, made in components.items()}
        return assemble(self, on_bytes, **ready)

    def _attention_on(self, device: torch.device) -> str:
        if self.attention != "auto":
            return self.attention
        return "nunchaku-fp16" if torch.cuda.get_device_capability(device) == TURING else "flashattn2"

    def _weights_file(self) -> str:
        """The file's name with this GPU's precision in it: a path, or owner/name/file on the hub."""
        precision = self.precision
        if precision == "auto" and PRECISION in self.weights:
            precision = _precision_of(resolve_device(self))
        return _user_path(self.weights.replace(PRECISION, precision))

    def _check_precision(self, device: torch.device) -> None:
        """nunchaku runs one precision on each GPU, whatever file it is given, and V2 asks the first GPU for it."""
        runs = _precision_of(device)
        if self.precision not in ("auto", runs):
            raise UserError(
                f"model.precision={self.precision}: on {describe_gpu(device)} nunchaku runs {runs} only; "
                "use model.precision=auto"
            )
        if GENERATIONS[self.generation] is V2 and _precision_of(torch.device("cuda:0")) != runs:
            raise UserError(
                f"model.device={self.device}: generation v2 takes the precision of cuda:0, which is not that of "
                f"{describe_gpu(device)}; show it this GPU alone with CUDA_VISIBLE_DEVICES={device.index}"
            )


@dataclass(frozen=True)
class NunchakuLiteModelConfig(ModelConfig):
    """A pipeline that diffusers' own `nunchaku_lite` quantizer loads: plain Flux blocks with 4-bit linear layers.

    configs/model/nunchaku-flux1-lite.yaml says what each field means.
    """

    precision: str
    packages: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.precision in ("auto", "int4", "nvfp4"), "precision", self.precision, "auto, int4 or nvfp4")
        is_list = isinstance(self.packages, Sequence) and not isinstance(self.packages, str)
        are_names = is_list and all(isinstance(name, str) for name in self.packages)
        require(are_names, "packages", self.packages, "a list of names")
        object.__setattr__(self, "packages", tuple(self.packages))

    def source(self) -> str:
        source = super().source()
        if self.path or PRECISION not in source:
            return source
        precision = self.precision
        if precision == "auto":
            precision = "nvfp4" if torch.cuda.get_device_capability(resolve_device(self)) >= (10, 0) else "int4"
        return source.replace(PRECISION, precision)

    def check(self) -> None:
        device = _device_of(self)
        require_cuda(device, "nunchaku_lite")
        capability = torch.cuda.get_device_capability(device)
        if capability < TURING or capability[0] == 9:
            raise UserError(
                f"nunchaku_lite has no kernels for {describe_gpu(device)}, only for Turing, Ampere, Ada and Blackwell: "
                "on this GPU use model=flux1-dev"
            )
        if self.precision == "nvfp4" and capability < (10, 0):
            raise UserError(
                f"model.precision=nvfp4 needs a Blackwell GPU, not {describe_gpu(device)}; use model.precision=int4"
            )
        super().check()
        if missing := [name for name in self.packages if find_spec(name) is None]:
            raise UserError(f"nunchaku_lite needs {' and '.join(missing)}: `pip install {' '.join(missing)}`")
        if not DIFFUSERS_TRUST_REMOTE_KERNELS:
            raise UserError(
                "nunchaku_lite runs code that it fetches from rootonchair/nunchaku-lite-kernels, which diffusers "
                "does not trust by itself: if you do, set DIFFUSERS_TRUST_REMOTE_KERNELS=true"
            )


def _device_of(config: ModelConfig) -> torch.device:
    """The device that `config` names; where it is no GPU, that is what to say, not that it cannot offload."""
    return resolve_device(replace(config, offload="none"))


def _precision_of(device: torch.device) -> str:
    """int4 or fp4, as nunchaku decides for the GPU."""
    return engine_attribute("nunchaku.utils", "get_precision")(device=device)


def _user_path(name: str) -> str:
    """A name with ~ resolved; names on the hub stay as they are."""
    return str(Path(name).expanduser())
