"""The trained reader as the one file that `h2cache.eval.metrics.reader` loads.

It holds float16 weights, shapes of signs, and the reader's error.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from h2cache.eval.files import atomic_files
from h2cache.eval.metrics.reader import WEIGHTS, Reader, WordReader

from .attributes import signs
from .reader import VALIDATION, held_out_scenes, train
from .scenes import Scene, draw
from .scores import word_scores


def own_error(reader: WordReader, scenes: Sequence[Scene]) -> float:
    """The share of drawn scenes of which the word is not read right to the last letter."""
    return 1 - word_scores([(scene.word, reader.read(draw(scene))) for scene in scenes])["accuracy"]


def export(network: Reader, target: Path, scenes: Sequence[Scene]) -> WordReader:
    """Write what `WordReader.load` reads, and return it: with the error on `scenes` that rounding leaves it."""
    rounded = Reader().eval().requires_grad_(False)
    rounded.load_state_dict({name: _rounded(tensor) for name, tensor in network.state_dict().items()})
    error = own_error(WordReader(rounded, signs(), math.nan), scenes)
    exported = WordReader(rounded, signs(), error)
    with atomic_files([target]) as (temporary,):
        exported.save(temporary, scenes=str(len(scenes)))
    return exported


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the reader's checkpoint (or to train it in)"
    )
    parser.add_argument("--target", type=Path, default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    exported = export(train(options.work), options.target, held_out_scenes(seed=1, count=VALIDATION))
    print(f"{options.target}: {100 * exported.own_error:.2f} % of {VALIDATION} drawn words are not read right")


if __name__ == "__main__":
    main()
