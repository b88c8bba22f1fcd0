"""Stage 3: the trained ControlNet as diffusers loads it, in float16."""

import inspect
from pathlib import Path

import torch
from diffusers import FluxControlNetModel, FluxPipeline

from tools.flux_mini.training import averaged

from .train import BASE, Upscaler


def export(work: Path, folder: Path) -> None:
    """Write config.json and the weights in float16, without the head."""
    model = Upscaler(FluxPipeline.from_pretrained(BASE, dtype=torch.float32))
    trained = averaged(model, work / "upscaler.pt").controlnet
    # Its configuration is flux-mini's, with the folder that this was loaded from and a field that a ControlNet lacks.
    known = inspect.signature(FluxControlNetModel.__init__).parameters
    exported = FluxControlNetModel(**{name: value for name, value in trained.config.items() if name in known})
    exported.load_state_dict(trained.state_dict())
    exported.half().save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
