"""Other weights of the same model, which an experiment's setting names: a LoRA merged into it, quantized layers.

So one run of an experiment can tell whether caching, distillation and quantization multiply. Quantization is torchao's,
weights alone, made at load; nothing of it is stored.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffusers import DiffusionPipeline

from h2cache.eval.errors import NotInstalled, UserError
from h2cache.eval.files import find_file
from h2cache.eval.models.identity import content_hash
from h2cache.eval.models.pipelines import is_number

QUANTIZED = ("int8", "int4")
GROUP = 32  # weights of a row that share a scale in int4; int8 has one scale a row


@dataclass(frozen=True)
class Weights:
    """What a transformer's weights are changed to.

    UserError where there is no such LoRA, NotInstalled where peft or torchao is missing.

    Fields:
        lora: a file of LoRA weights, seen from where you are or from this repository; None: none.
        quantized: one of `QUANTIZED`: to what the linear layers of its blocks are rounded; None: as they are.
        lora_strength: what the LoRA is multiplied by.
    """

    lora: str | None = None
    quantized: str | None = None
    lora_strength: float = 1.0

    def __post_init__(self) -> None:
        if self.lora is None and self.quantized is None:
            raise UserError("weights must name a lora, quantized, or both")
        if self.lora is not None and find_file(str(self.lora)) is None:
            raise UserError(f"weights: lora={self.lora}: there is no such file; give one of LoRA weights")
        if self.quantized not in (None, *QUANTIZED):
            raise UserError(f"weights: quantized={self.quantized} is not allowed: choose {' or '.join(QUANTIZED)}")
        if not is_number(self.lora_strength) or (self.lora is None and self.lora_strength != 1.0):
            raise UserError(f"weights: lora_strength={self.lora_strength} is not allowed: give a number, and a lora")
        for field, library in (("lora", "peft"), ("quantized", "torchao")):
            if getattr(self, field) and importlib.util.find_spec(library) is None:
                raise NotInstalled(f"weights: {field} needs {library}: pip install {library}")

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What an image depends on, for records: a LoRA by its content."""
        lora = {"lora": content_hash(find_file(self.lora))} if self.lora else {}
        lora |= {"lora_strength": self.lora_strength} if self.lora_strength != 1.0 else {}
        return lora | ({"quantized": self.quantized} if self.quantized else {})

    def put_on(self, pipe: DiffusionPipeline) -> None:
        """Change the pipeline's transformer for good: give it a copy."""
        if self.lora:
            file = find_file(self.lora)
            pipe.load_lora_weights(file.parent, weight_name=file.name)
            pipe.fuse_lora(lora_scale=self.lora_strength)
            pipe.unload_lora_weights()
        if self.quantized:
            _quantize(pipe, self.quantized)


def _quantize(pipe: DiffusionPipeline, to: str) -> None:
    """Round the linear layers of the transformer's blocks. What embeds and modulates is small, and stays as it is."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    rounding = {
        "int8": Int8WeightOnlyConfig(),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
    }[to]

    def is_meant(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "blocks." in name and module.in_features % GROUP == 0

    quantize_(pipe.transformer, rounding, is_meant)
