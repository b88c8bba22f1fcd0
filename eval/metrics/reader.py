"""Reads the word in a picture by flux-mini: a small convolutional network with CTC on the letters that
`h2cache.eval.metrics.signs` finds. It has no vocabulary into which it could correct a misspelt sign.
`tools.flux_mini.reader` trained it.
"""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from h2cache.eval.files import REPOSITORY, file_digest
from h2cache.eval.metrics.metric import Means, Metric, Scorer, Shown, Unavailable
from h2cache.eval.metrics.signs import SIZE, WINDOW, Signs, find, letters_at, pixels_of

WEIGHTS = REPOSITORY / "assets/flux-mini-reader.safetensors"
LETTERS = string.ascii_uppercase
BLANK = 0  # CTC's "no letter here"; A is 1
CLASSES = 1 + len(LETTERS)
FRAMES = WINDOW[1] // 2
NETWORK, SIGNS = "network.", "signs."  # what the tensors of a file belong to
OWN_ERROR, NAMES = "word_error_on_renders", ("shapes", "colours")  # of the file's metadata
SEPARATOR = ", "


class Reader(nn.Module):
    """(B, 1, 48, 120) letters to (B, 60, 27) logits, one frame for every second column of pixels."""

    def __init__(self) -> None:
        super().__init__()

        def layer(inside: int, outside: int, kernel=3, stride=1, padding=1) -> nn.Sequential:
            convolution = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())

        self.layers = nn.Sequential(
            layer(1, 24),  # 48x120
            layer(24, 48, stride=2),
            layer(48, 96, stride=2),  # 12x30
            layer(96, 96),
            layer(96, 128, stride=(2, 1)),
            layer(128, 160, (6, 1), padding=0),  # 1x30
            layer(160, 160, (1, 3), padding=(0, 1)),
            layer(160, 160, (1, 3), padding=(0, 1)),
        )
        self.head = nn.Linear(160, 2 * CLASSES)  # two frames a column: narrow letters stand close

    def forward(self, letters: Tensor) -> Tensor:
        columns = self.layers(letters).squeeze(2).transpose(1, 2)
        return self.head(columns).reshape(len(letters), FRAMES, CLASSES)


def decode(logits: Tensor) -> list[str]:
    """The best path of CTC: the likeliest class of each frame, repetitions and blanks dropped."""
    words = []
    for path in logits.argmax(dim=-1).tolist():
        kept = [c for c, before in zip(path, [BLANK, *path], strict=False) if c not in (BLANK, before)]
        words.append("".join(LETTERS[c - 1] for c in kept))
    return words


@torch.no_grad()
def read(reader: Reader, letters: Sequence[np.ndarray], batch: int = 50) -> list[str]:
    """The words in (48, 120) windows of letters; "" where no letter is seen."""
    words = []
    for start in range(0, len(letters), batch):
        words += decode(reader(stack(letters[start : start + batch])))
    return words


def stack(letters: Sequence[np.ndarray]) -> Tensor:
    """(B, 1, 48, 120) float32"""
    return torch.from_numpy(np.stack(letters)).float().unsqueeze(1)


@dataclass(frozen=True, eq=False)
class WordReader:
    """The trained network and what it needs to find the letters; on the CPU, where a picture takes milliseconds.

    own_error: the share of words that it reads wrong in drawn scenes of held-out words, where the truth is known.
    """

    network: Reader
    signs: Signs
    own_error: float

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "WordReader":
        """What `save` wrote; OSError or a safetensors error if there is none."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata()
        network = Reader()
        network.load_state_dict(_part(tensors, NETWORK))
        arrays = {name: tensor.numpy() for name, tensor in _part(tensors, SIGNS).items()}
        names = {name: tuple(metadata[name].split(SEPARATOR)) for name in NAMES}
        return cls(network.eval().requires_grad_(False), Signs(**arrays, **names), float(metadata[OWN_ERROR]))

    def save(self, path: Path, **metadata: str) -> None:
        """One file, the network's weights in float16."""
        state = self.network.state_dict()
        weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        arrays = {each.name: getattr(self.signs, each.name) for each in fields(Signs) if each.name not in NAMES}
        tensors = {NETWORK + name: tensor.contiguous() for name, tensor in weights.items()}
        tensors |= {SIGNS + name: torch.from_numpy(array) for name, array in arrays.items()}
        names = {name: SEPARATOR.join(getattr(self.signs, name)) for name in NAMES}
        save_file(tensors, path, metadata | names | {OWN_ERROR: f"{self.own_error:.4g}"})

    def read(self, image: Image.Image) -> str:
        """The word in a 128x128 RGB picture, "" if no letter is seen; ValueError for another size."""
        pixels = pixels_of(image)
        place, _ = find(pixels, self.signs)
        letters, _ = letters_at(pixels, self.signs, place)
        return read(self.network, [letters])[0]


def loaded_reader() -> WordReader:
    """The reader of this repository; Unavailable if its weights cannot be loaded."""
    try:
        return WordReader.load(WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise Unavailable(f"its weights cannot be loaded ({error})") from error


def load_accuracy(means: Means) -> Scorer:
    """What says of a picture whether it has the prompt's word: 1.0 where the word is read exactly, else 0.0.

    NaN for pictures of another size than flux-mini's, and for words with letters that the reader does not know.
    """
    reader = loaded_reader()

    def accuracy(shown: Shown) -> float:
        if shown.word is None or not can_read(shown.word) or shown.image.size != (SIZE, SIZE):
            return math.nan
        return float(reader.read(shown.image.convert("RGB")) == shown.word)

    return accuracy


WORD_ACCURACY = Metric("words right", load_accuracy, version=lambda means: f"1-{file_digest(WEIGHTS)}", form="%")


def can_read(word: str) -> bool:
    """Whether every letter of the word is one that the reader knows."""
    return bool(word) and set(word) <= set(LETTERS)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
