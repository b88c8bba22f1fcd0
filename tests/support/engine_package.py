"""Packages called nunchaku for the tests of diagnosis and loading, and machines to find them on.

They have the attributes that loading uses, and write down how they were called. The transformers are diffusers' own, so
that a pipeline around one draws; what nunchaku computes is the business of tests/standins.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

CORE = f"_C{EXTENSION_SUFFIXES[0]}"
SERIES = ".".join(torch.__version__.split(".")[:2])
VERSION = f"1.2.1+cu{torch.version.cuda or '13.0'}torch{SERIES}"

ADA, TURING, HOPPER, VOLTA, BLACKWELL = (8, 9), (7, 5), (9, 0), (7, 0), (12, 0)  # compute capabilities

ENGINE = {
    "__init__.py": """
import logging
from nunchaku.models.transformers.calls import CALLS, Recorded
logging.basicConfig(level=logging.INFO)

class NunchakuFluxTransformer2dModel(Recorded):
    def set_attention_impl(self, name): CALLS.append(("set_attention_impl", name))
    def update_lora_params(self, file):
        CALLS.append(("update_lora_params", file))
        if not file.endswith(".safetensors"):
            raise ValueError("too short to extract repo_id and subfolder")
    def set_lora_strength(self, strength): CALLS.append(("set_lora_strength", strength))

class NunchakuT5EncoderModel:
    @classmethod
    def from_pretrained(cls, file, **arguments):
        from transformers import T5EncoderModel
        CALLS.append(("T5", file, arguments))
        return T5EncoderModel.from_pretrained(file, dtype=arguments["torch_dtype"])
""",
    "models/__init__.py": "",
    "models/transformers/__init__.py": "",
    "models/transformers/calls.py": """
from diffusers import FluxTransformer2DModel
CALLS = []

class Recorded(FluxTransformer2DModel):
    @classmethod
    def from_pretrained(cls, file, **arguments):
        CALLS.append((cls.__name__, file, arguments))
        print("Injecting quantized module")
        if file.startswith("nobody/"):
            raise FileNotFoundError("no network")
        from safetensors.torch import load_file
        config = FluxTransformer2DModel.load_config(file.rsplit("/", 1)[0])
        transformer = FluxTransformer2DModel.from_config(config)
        transformer.load_state_dict(load_file(file))
        transformer.__class__ = cls
        return transformer.to(arguments["torch_dtype"])
""",
    "models/transformers/transformer_flux_v2.py": """
from nunchaku.models.transformers.calls import CALLS, Recorded

class NunchakuFluxTransformer2DModelV2(Recorded):
    @classmethod
    def from_pretrained(cls, file, **arguments):
        transformer = super().from_pretrained(file, **arguments)
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.attn.set_processor = lambda name: CALLS.append(("set_processor", name))
        return transformer
""",
    "utils.py": """
import torch

def get_precision(precision="auto", device="cuda"):
    capability = torch.cuda.get_device_capability(device)
    return "fp4" if capability == (12, 0) else "int4"
""",
    CORE: "",
}
CHANGE_POINTS = {"__init__.py": "from nunchaku.nunchaku import Nunchaku", "nunchaku.py": "class Nunchaku: ..."}


def install(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    files: dict[str, str | None],
    version: str | None,
    summary: str = "",
) -> Path:
    """Write a package called nunchaku into `folder` and put it first on Python's path; None leaves a file out."""
    for name, text in files.items():
        if text is not None:
            file = folder / "nunchaku" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    if version is not None:
        metadata = folder / "nunchaku.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: nunchaku\nVersion: {version}\nSummary: {summary}\n")
    forget(monkeypatch)
    monkeypatch.syspath_prepend(str(folder))
    return folder / "nunchaku"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no nunchaku imported, until the test ends."""
    for name in [name for name in sys.modules if name.split(".")[0] == "nunchaku"]:
        monkeypatch.delitem(sys.modules, name)


def give_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Have torch report GPUs of these compute capabilities."""

    def capability(device: object = 0) -> tuple[int, int]:
        return capabilities[torch.device(device).index or 0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "NVIDIA Test GPU")


def assert_says(message: str, *words: str) -> None:
    assert [word for word in words if word not in message] == []
