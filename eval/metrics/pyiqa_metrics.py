"""pyiqa's metrics: which there are, how they are loaded without a long wait or a mess, and how one image is scored.

pyiqa is imported when it is asked for: it takes seconds.

`clipiqa` is CLIP-IQA as its paper defines it (Wang et al., AAAI 2023): CLIP's RN50 without positional embedding, and
one pair of prompts "Good photo." and "Bad photo."; pyiqa's own default is the mean over five other pairs. What
H2-Cache's paper is taken to report is `clipiqa_published` (`h2cache.eval.metrics.preference`).
"""

import contextlib
import io
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from h2cache.eval.metrics.metric import Means, Metric, Scorer, Shown, Unavailable
from h2cache.eval.metrics.sets import Features, SetMetric
from h2cache.eval.metrics.weights import first_line, loaded

SEED = 0  # a few metrics crop at random
CLIPIQA_PROMPTS = ("Good photo.", "Bad photo.")
LABELS = {"clipiqa": "CLIP-IQA", "lpips": "LPIPS", "clipscore": "CLIPScore"}
# Of a folder of weights. torchvision, whose AlexNet LPIPS takes, looks nowhere but in $TORCH_HOME/hub/checkpoints.
FILES = {
    "clipiqa": ("RN50.pt",),
    "clipscore": ("ViT-B-32.pt",),
    "lpips": ("LPIPS_v0.1_alex-df73285e.pth", "hub/checkpoints/alexnet-owt-7be5be79.pth"),
}
# These compare the features of two sets of images.
OF_SETS = {"fid": "FID", "sfid": "sFID", "fid_dinov2": "FID, DINOv2"}
OF_MANY_IMAGES = (*OF_SETS, "inception_score")


def names() -> list[str]:
    """The metrics that score single images."""
    import pyiqa

    return [name for name in pyiqa.list_models() if name not in OF_MANY_IMAGES]


def metric(name: str) -> Metric | None:
    """The metric called `name`; None for a name that pyiqa does not have."""
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    if name not in names():
        return None
    settings = DEFAULT_CONFIGS[name]
    return Metric(
        label=LABELS.get(name, name),
        load=partial(_scorer, name),
        version=_version,
        files=FILES.get(name, ()),
        needs_reference=settings["metric_mode"] == "FR",
        lower_is_better=settings.get("lower_better", False),
        fetches=True,
    )


def set_metric(name: str) -> SetMetric | None:
    """The metric of sets called `name`; None for a name that is not of OF_SETS."""
    return SetMetric(OF_SETS[name], partial(_features, name), fetches=True) if name in OF_SETS else None


def _features(name: str, means: Means) -> Features:
    """pyiqa's own network and its way of resizing ("clean"), image by image: it takes folders alone."""
    from pyiqa.archs.fid_arch import get_folder_features

    net = loaded(name, (), means.online, partial(load, name, means.device)).model.net
    options = {"num_workers": 0, "batch_size": 1, "test_img_size": net.test_img_size, "verbose": False}

    def of(file: Path) -> np.ndarray:
        with TemporaryDirectory() as folder:
            (Path(folder) / file.name).symlink_to(file.resolve())
            return get_folder_features(folder, net.model, device=means.device, **options)[0].astype(np.float64)

    return of


def _version(means: Means) -> str:
    import pyiqa

    return f"pyiqa-{pyiqa.__version__}"


def _scorer(name: str, means: Means) -> Scorer:
    local = means.local(FILES.get(name, ()))
    network = loaded(name, local, means.online, partial(load, name, means.device, local))

    def score(shown: Shown) -> float:
        pixels = to_tensor(shown.image)
        reference = to_tensor(shown.reference) if shown.reference is not None else None
        try:
            return network.score(pixels, reference, shown.prompt)
        except Exception as error:  # a metric may dislike a size or a prompt in as many ways as pyiqa has metrics
            size = f"{shown.image.width}x{shown.image.height}"
            raise Unavailable(f"it fails on an image of {size} ({first_line(error)})") from error

    return score


def to_tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 RGB in [0, 1], as pyiqa wants it."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)


@dataclass(frozen=True)
class Network:
    """A loaded metric. `model` is pyiqa's, in evaluation mode on its device."""

    name: str
    model: Any
    device: torch.device

    def score(self, pixels: Tensor, reference: Tensor | None, prompt: str) -> float:
        """(1, 3, H, W) RGB in [0, 1] to one number, the same for the same pixels; ValueError outside [0, 1]."""
        for each in (pixels, reference):
            if each is not None and not (each.min() >= 0 and each.max() <= 1):
                raise ValueError(f"pixels from {each.min():g} to {each.max():g}: they must lie in [0, 1]")
        images = [each.to(self.device) for each in (pixels, reference) if each is not None]
        options = {"caption_list": [prompt]} if self.name == "clipscore" else {}
        with torch.no_grad(), _fixed_randomness(self.device), contextlib.redirect_stdout(io.StringIO()):
            result = self.model(*images, **options)
        return torch.as_tensor(result).double().item()


def load(name: str, device: torch.device, local: Sequence[Path] = ()) -> Network:
    """Build the network on the weights `local`, those of FILES in their order; or on those in caches, or fetched.

    Raises whatever the attempt raises.
    """
    import pyiqa

    options: dict[str, str] = {}
    if local:
        options = {"pretrained_model_path" if name == "lpips" else "backbone": str(local[0])}
    home = _torch_home(local[1].parents[2] if name == "lpips" and local else None)
    with home, _no_empty_folders(), _llama_as_it_was():
        model = pyiqa.create_metric(name, device=device, **options)
    if name == "clipiqa":
        from pyiqa.archs.clip_imports import clip

        model.net.prompt_pairs = clip.tokenize(list(CLIPIQA_PROMPTS))
    if name == "clipscore" and device.type == "cpu":
        model.float()  # clip loads in half precision where there is a GPU, even if this is not to run on it
    return Network(name, model.eval().requires_grad_(False), device)


@contextlib.contextmanager
def _llama_as_it_was() -> Iterator[None]:
    """Keeps transformers' Llama, the text encoder of HunyuanVideo, what it is.

    pyiqa imports all of its networks where it does not find one at once, and two of them replace parts of it.
    """
    from transformers.models.llama import configuration_llama, modeling_llama

    places = (configuration_llama, modeling_llama, modeling_llama.LlamaModel, modeling_llama.LlamaForCausalLM)
    before = [dict(vars(place)) for place in places]
    try:
        yield
    finally:
        for place, known in zip(places, before, strict=True):
            for name, value in list(vars(place).items()):
                if name not in known:
                    delattr(place, name)
                elif value is not known[name]:
                    setattr(place, name, known[name])


@contextlib.contextmanager
def _torch_home(folder: Path | None) -> Iterator[None]:
    """Where torch.hub looks for files inside; None: where it always does."""
    before = os.environ.get("TORCH_HOME")
    if folder:
        os.environ["TORCH_HOME"] = str(folder)
    try:
        yield
    finally:
        if folder:
            os.environ.pop("TORCH_HOME")
        if before is not None:
            os.environ["TORCH_HOME"] = before


@contextlib.contextmanager
def _no_empty_folders() -> Iterator[None]:
    """Remove the cache folders that were made for a file which then did not come."""
    hub = Path(torch.hub.get_dir())
    clip = Path("~/.cache/clip").expanduser()
    folders = [hub / "clip", hub / "pyiqa", hub / "checkpoints", hub, hub.parent, clip, clip.parent]
    made = [folder for folder in folders if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not there, or not empty
                os.rmdir(folder)


@contextlib.contextmanager
def _fixed_randomness(device: torch.device) -> Iterator[None]:
    """Every generator seeded inside, and outside as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
