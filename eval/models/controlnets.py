"""Flux with a ControlNet, which shows the pipeline a picture beside the prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffusers import FluxControlNetModel, FluxControlNetPipeline
from huggingface_hub import snapshot_download

from h2cache.eval.errors import UserError
from h2cache.eval.files import REPOSITORY
from h2cache.eval.models.explained import explained
from h2cache.eval.models.loading import Component, OnBytes, unwatched, weight_bytes
from h2cache.eval.models.pipelines import DTYPES, ModelConfig, assemble, find_folder, require

WEIGHTS_AND_CONFIG = ("config.json", "diffusion_pytorch_model*")


@dataclass(frozen=True)
class FluxControlNetConfig(ModelConfig):
    """A Flux pipeline and a ControlNet for it; configs/model/flux-mini-upscaler.yaml says what each field means."""

    pipeline = FluxControlNetPipeline
    picture_argument = "control_image"
    noun: ClassVar[str] = "Flux pipeline with a ControlNet"

    controlnet: str

    def __post_init__(self) -> None:
        super().__post_init__()
        is_name = isinstance(self.controlnet, str) and bool(self.controlnet)
        require(is_name, "controlnet", self.controlnet, "a ControlNet's folder, or its name on the hub")

    @property
    def other_sources(self) -> dict[str, str]:
        """UserError for a path that looks like a folder here and is none."""
        folder = find_folder(self.controlnet, "config.json")
        if folder is None and (self.path or self.controlnet.count("/") != 1):
            raise UserError(
                f"model.controlnet={self.controlnet}: no ControlNet there (a folder with a config.json), seen from "
                f"{Path.cwd()} or from {REPOSITORY}; restore it (git checkout) or give the folder of another"
            )
        return {"controlnet": str(folder or self.controlnet)}

    @property
    def hub_files(self) -> tuple[str, ...]:
        source = self.other_sources["controlnet"]
        return (*super().hub_files, *(() if Path(source).is_dir() else (f"{source}/config.json",)))

    def check(self) -> None:
        super().check()
        self.other_sources  # noqa: B018 (raises)

    def load(self, on_bytes: OnBytes = unwatched) -> FluxControlNetPipeline:
        source = self.other_sources["controlnet"]
        here = Path(source).is_dir()
        with explained(source, "a FluxControlNetModel", "controlnet"):
            folder = Path(source if here else snapshot_download(source, allow_patterns=WEIGHTS_AND_CONFIG))

        def load() -> FluxControlNetModel:
            with explained(source, "a FluxControlNetModel", "controlnet"):
                return FluxControlNetModel.from_pretrained(folder, torch_dtype=DTYPES[self.dtype])

        return assemble(self, on_bytes, controlnet=Component(weight_bytes(folder), load))
