"""Loads a pipeline component by component, and says how many bytes of its weights are in place.

The sizes are those of the weight files, which are known before anything is read.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from diffusers import AutoModel, DiffusionPipeline
from torch import nn

OnBytes = Callable[[int, int], None]  # called with (bytes in place, bytes of all)
LIBRARIES = ("diffusers", "transformers")  # whose components are loaded here; a pipeline loads the others itself


def unwatched(done: int, total: int) -> None:
    """The `OnBytes` of whoever does not want to know."""


@dataclass(frozen=True)
class Component:
    """A part of a pipeline with weights.

    Fields:
        size: of its weight files, in bytes.
        load: makes it.
        placed: whether `load` puts it where it belongs, so that it is not moved.
    """

    size: int
    load: Callable[[], nn.Module]
    placed: bool = False


def loaded(
    pipeline: type[DiffusionPipeline],
    folder: Path,
    dtypes: torch.dtype | Mapping[str, torch.dtype],
    device: torch.device | None,
    on_bytes: OnBytes,
    others: Mapping[str, Component],
) -> DiffusionPipeline:
    """The pipeline in `folder`. The smallest component comes first, so that the time left is known early.

    Args:
        dtypes: of the weights; one for all, or by component, with `default` for those that are not named.
        device: where the components go as they are loaded; None: they stay on the CPU.
        others: components that take the place of the folder's own.
    """
    wanted = {**_components(pipeline, folder, dtypes), **others}
    total, done = sum(each.size for each in wanted.values()), 0
    made: dict[str, nn.Module] = {}
    on_bytes(0, total)
    for name, component in sorted(wanted.items(), key=lambda item: item[1].size):
        made[name] = component.load()
        if device and not component.placed:
            for share in _moved(made[name], device):
                on_bytes(done + int(share * component.size), total)
        done += component.size
        on_bytes(done, total)
    return pipeline.from_pretrained(folder, dtype=dtypes, **made)


def weight_bytes(folder: Path) -> int:
    """The size of a model's weights; of several variants (model.fp16.safetensors) the one without a name."""
    files = [file for file in folder.glob("*.safetensors") if "." not in file.stem] or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def _components(
    pipeline: type[DiffusionPipeline], folder: Path, dtypes: torch.dtype | Mapping[str, torch.dtype]
) -> dict[str, Component]:
    """Those of the folder that have weights and that the pipeline takes."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    taken = index if pipeline is DiffusionPipeline else signature(pipeline.__init__).parameters
    return {
        name: Component(size, _loader(folder, name, dtypes))
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] in LIBRARIES and name in taken
        if (size := weight_bytes(folder / name))
    }


def _loader(folder: Path, name: str, dtypes: torch.dtype | Mapping[str, torch.dtype]) -> Callable[[], nn.Module]:
    dtype = dtypes.get(name, dtypes["default"]) if isinstance(dtypes, Mapping) else dtypes
    return lambda: AutoModel.from_pretrained(str(folder), subfolder=name, dtype=dtype)


def _moved(model: nn.Module, device: torch.device) -> Iterator[float]:
    """Move it module by module, children first; yields the share of its weights that is there."""
    parts = [(each, _own_bytes(each)) for each in reversed(list(model.modules()))]
    total, done = sum(size for _, size in parts), 0
    for part, size in parts:
        part.to(device)
        done += size
        yield done / max(total, 1)


def _own_bytes(module: nn.Module) -> int:
    """Of the weights that it holds itself, not its children."""
    return sum(each.nbytes for each in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
