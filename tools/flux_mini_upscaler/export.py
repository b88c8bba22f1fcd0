"""Stage 3: the trained ControlNet as diffusers loads it, in float16."""

import inspect
from pathlib import Path

import torch
from diffusers import FluxControlNetModel, FluxPipeline

from tools.flux_mini.training import Average

from .train import BASE, Upscaler


def averaged(checkpoint: Path) -> FluxControlNetModel:
    """The averaged weights of a checkpoint of the training, in float32."""
    model = Upscaler(FluxPipeline.from_pretrained(BASE, dtype=torch.float32))
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    average = Average(model.parameters())
    average.load_state_dict(state["average"])
    average.copy_to_model()
    return model.controlnet


def export(work: Path, folder: Path) -> None:
    """Write config.json and the weights in float16, without the head."""
    trained = averaged(work / "upscaler.pt")
    # Its configuration is flux-mini's, with the folder that this was loaded from and a field that a ControlNet lacks.
    known = inspect.signature(FluxControlNetModel.__init__).parameters
    exported = FluxControlNetModel(**{name: value for name, value in trained.config.items() if name in known})
    exported.load_state_dict(trained.state_dict())
    exported.half().save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
