"""Flux with a LoRA merged into its transformer, such as one that draws in few steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffusers import FluxPipeline

from h2cache.eval.errors import UserError
from h2cache.eval.files import REPOSITORY, find_file
from h2cache.eval.models.explained import explained
from h2cache.eval.models.loading import OnBytes, unwatched
from h2cache.eval.models.pipelines import ModelConfig, assemble, is_number, require
from h2cache.eval.models.weights import Weights


@dataclass(frozen=True)
class FluxLoraConfig(ModelConfig):
    """A Flux pipeline and a LoRA for it.

    Fields beyond those of `ModelConfig`:
        lora: a file of LoRA weights, as diffusers loads them.
        lora_strength: what they are multiplied by.
    """

    noun: ClassVar[str] = "Flux pipeline with a LoRA"

    lora: str
    lora_strength: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.lora, str) and bool(self.lora), "lora", self.lora, "a file of LoRA weights")
        require(is_number(self.lora_strength), "lora_strength", self.lora_strength, "a number")

    @property
    def other_sources(self) -> dict[str, str]:
        """UserError if there is no such file."""
        file = find_file(self.lora)
        if file is None:
            raise UserError(
                f"model.lora={self.lora}: there is no such file, seen from {Path.cwd()} or from {REPOSITORY}; "
                "restore it (git checkout) or give another file of LoRA weights"
            )
        return {"lora": str(file)}

    def check(self) -> None:
        super().check()
        self._weights()

    def load(self, on_bytes: OnBytes = unwatched) -> FluxPipeline:
        weights = self._weights()
        pipe = assemble(self, on_bytes)
        with explained(weights.lora, "a LoRA", "lora"):
            weights.put_on(pipe)
        return pipe

    def _weights(self) -> Weights:
        return Weights(lora=self.other_sources["lora"], lora_strength=self.lora_strength)
