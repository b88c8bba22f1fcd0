"""pyiqa's metrics: which there are, how they are loaded without a long wait or a mess, and how one image is scored.

pyiqa is imported when it is asked for: it takes seconds.

`clipiqa` is CLIP-IQA as its paper defines it (Wang et al., AAAI 2023): CLIP's RN50 without positional embedding, and
one pair of prompts "Good photo." and "Bad photo."; pyiqa's own default is the mean over five other pairs. The code
published for H2-Cache gives pixels of 0 to 255 to a wrapper that expects 0 to 1, so that the paper's scores are on
another scale: compare changes in percent.
"""

import contextlib
import io
import os
import random
import socket
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from torch import Tensor

from h2cache.eval.errors import UserError
from h2cache.eval.files import file_digest
from h2cache.eval.metrics.metric import Means, Metric, Scorer, Shown, Unavailable

# Seconds without an answer: pyiqa, clip and torch.hub would wait for ever.
FETCH_TIMEOUT, PROBE_TIMEOUT = 10.0, 3.0
SEED = 0  # a few metrics crop at random
CLIPIQA_PROMPTS = ("Good photo.", "Bad photo.")
# These compare the statistics of whole folders.
LABELS = {"clipiqa": "CLIP-IQA", "lpips": "LPIPS", "clipscore": "CLIPScore"}
OF_MANY_IMAGES = ("fid", "sfid", "fid_dinov2", "inception_score")


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
        version=partial(_version, name),
        needs_reference=settings["metric_mode"] == "FR",
        lower_is_better=settings.get("lower_better", False),
        fetches=True,
    )


def _version(name: str, means: Means) -> str:
    import pyiqa

    own = name == "clipiqa" and means.clipiqa_checkpoint
    return f"pyiqa-{pyiqa.__version__}" + (f"-{file_digest(means.clipiqa_checkpoint)}" if own else "")


def _scorer(name: str, means: Means) -> Scorer:
    given = means.clipiqa_checkpoint if name == "clipiqa" else None
    try:
        network = load(name, means.device, means.online, given)
    except Exception as error:  # hubs, archives and optional packages fail in more ways than can be listed
        if given and not isinstance(error, ImportError):
            raise UserError(
                f"clipiqa_checkpoint={given} does not load as OpenAI's CLIP RN50.pt ({first_line(error)}); "
                "fetch it again, or leave the option out"
            ) from error
        raise Unavailable(why_not_loaded(error, means.online)) from error

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


def is_online() -> bool:
    """Whether the hub that has most of the weights answers at all; False where the environment forbids to ask it."""
    if constants.is_offline_mode():
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def load(name: str, device: torch.device, online: bool, checkpoint: Path | None = None) -> Network:
    """Fetch the weights (or find them in the cache, or for `clipiqa` in `checkpoint`) and build the network.

    Raises whatever the attempt raises, after FETCH_TIMEOUT without an answer, or much sooner if not `online`.
    """
    import pyiqa

    options = {"backbone": str(checkpoint)} if checkpoint else {}
    with _quietly(), _patience(online), _no_empty_folders():
        model = pyiqa.create_metric(name, device=device, **options)
    if name == "clipiqa":
        from pyiqa.archs.clip_imports import clip

        model.net.prompt_pairs = clip.tokenize(list(CLIPIQA_PROMPTS))
    if name == "clipscore" and device.type == "cpu":
        model.float()  # clip loads in half precision where there is a GPU, even if this is not to run on it
    return Network(name, model.eval().requires_grad_(False), device)


def why_not_loaded(error: Exception, online: bool) -> str:
    """One short sentence."""
    if isinstance(error, ModuleNotFoundError) and error.name == "pkg_resources":
        return "openai-clip needs pkg_resources, which setuptools 82 dropped: pip install 'setuptools<82'"
    if isinstance(error, ImportError):
        return f"a package is missing ({first_line(error)})"
    if not online and _is_of_network(error):
        return "its weights are not in the local cache, and there is no network to fetch them"
    return f"its weights cannot be loaded ({first_line(error)})"


def first_line(error: Exception) -> str:
    """What the error says first, or its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_of_network(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is a failure to reach another machine."""
    return error is not None and (
        isinstance(error, (urllib.error.URLError, ConnectionError, TimeoutError, LocalEntryNotFoundError))
        or _is_of_network(error.__cause__ or error.__context__)
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Neither prints nor warnings; the bar of a download, on stderr, stays."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _patience(online: bool) -> Iterator[None]:
    """An end to waiting for sockets, none of whose users here takes a timeout of its own; and, if not `online`, none of
    the hub client's retries, which would take most of a minute for each file."""
    timeout, offline = socket.getdefaulttimeout(), constants.HF_HUB_OFFLINE
    socket.setdefaulttimeout(FETCH_TIMEOUT if online else PROBE_TIMEOUT)
    constants.HF_HUB_OFFLINE = offline or not online
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        socket.setdefaulttimeout(timeout)


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
