"""nunchaku's transformers for the tests: stand-ins on any machine, and the real ones where they are installed.

`subject` runs a test on each. The real ones need the package, a GPU that it knows, and H2CACHE_NUNCHAKU_CHECKPOINT, the
path of a FLUX.1 checkpoint (`svdq-*.safetensors`); else they are skipped with the reason.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attachments import take_off
from diffusers import FluxTransformer2DModel
from loops import denoise, denoising
from methods_under_test import METHODS, has_clusters, measures, methods, skips_modules
from thorough import product
from tiny import tiny_transformer
from torch import Tensor, nn

STANDINS = Path(__file__).resolve().parents[1] / "standins"
CHECKPOINT = "H2CACHE_NUNCHAKU_CHECKPOINT"
CLASSES = {"v1": "NunchakuFluxTransformer2dModel", "v2": "NunchakuFluxTransformer2DModelV2"}

# Both generations run blocks whole.
STAGED = methods(lambda config: not skips_modules(config))
REFUSED = methods(skips_modules)
# The first that measures and the first with a schedule, where a test has more to vary than the method.
ONE_OF_EACH_SORT = list({measures(each.values[0]): each.id for each in reversed(STAGED)}.values())
assert any(has_clusters(method.values[0]) for method in REFUSED) and len(STAGED) + len(REFUSED) == len(METHODS)


@dataclass(frozen=True)
class Subject:
    """A transformer under test, and how to call it."""

    generation: str
    transformer: nn.Module
    dtype: torch.dtype = torch.bfloat16
    real: bool = False

    @property
    def takes_batches(self) -> bool:
        """V2's kernels take one image at a time."""
        return self.generation == "v1"

    @property
    def front(self) -> nn.Module:
        """V1's module in front of the core."""
        return self.transformer.transformer_blocks[0]

    def denoise(self, **options: Any) -> Tensor:
        return denoise(self.transformer, **{"dtype": self.dtype, "steps": 9} | options)

    def denoising(self, **options: Any) -> Iterator[Tensor]:
        return denoising(self.transformer, **{"dtype": self.dtype, "steps": 9} | options)


@contextmanager
def standing_in() -> Iterator[ModuleType]:
    """While open, `import nunchaku` finds the stand-in, whatever is installed."""

    def named() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "nunchaku"]

    hidden = {name: sys.modules.pop(name) for name in named()}
    sys.path.insert(0, str(STANDINS))
    try:
        yield importlib.import_module("nunchaku")
    finally:
        sys.path.remove(str(STANDINS))
        for name in named():
            del sys.modules[name]
        sys.modules.update(hidden)


@pytest.fixture(scope="session")
def nunchaku() -> ModuleType:
    """The stand-in package, of which nothing is left where others would find it."""
    with standing_in() as package:
        return package


def flux(
    double: int = 2, single: int = 3, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> FluxTransformer2DModel:
    """What the stand-ins stand for, with diffusers' own blocks."""
    return tiny_transformer(double, single, seed).to(dtype)


def standin(package: ModuleType, generation: str, model: FluxTransformer2DModel, **options: Any) -> Subject:
    """The stand-in for `model`, in its dtype and with its weights."""
    made = getattr(package, CLASSES[generation]).standing_for(model, torch_dtype=model.dtype, **options)
    return Subject(generation, made, model.dtype)


def reason_to_skip() -> str | None:
    """Why nothing can be tested on the real nunchaku here."""
    spec = importlib.util.find_spec("nunchaku")
    if spec is None:
        return "nunchaku is not installed"
    if not torch.cuda.is_available():
        return "nunchaku needs a GPU"
    if not os.environ.get(CHECKPOINT):
        return f"{CHECKPOINT} names no checkpoint"
    return None


@cache
def _real(generation: str) -> Subject:
    package = importlib.import_module("nunchaku")
    made = getattr(package, CLASSES[generation]).from_pretrained(os.environ[CHECKPOINT], device="cuda")
    return Subject(generation, made, real=True)


def _subject(name: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(name, id=name, marks=marks)


REAL = (pytest.mark.nunchaku, pytest.mark.thorough)
SUBJECTS = [
    *(_subject("v1-standin"), _subject("v2-standin")),
    *(_subject("v1-nunchaku", *REAL), _subject("v2-nunchaku", *REAL)),
]


# Instead of all, for a test with batches: those whose kernels take more than one image at a time.
batching = pytest.mark.parametrize("subject", SUBJECTS[::2], indirect=True)


def in_turn(method: str, subject: str) -> bool:
    """Whether `make test` runs a method on a subject: the methods take the generations in turn, two have both."""
    ids = [each.id for each in STAGED]
    return method in ONE_OF_EACH_SORT or subject.startswith(("v1", "v2")[ids.index(method) % 2])


def on_subjects(methods: Sequence) -> pytest.MarkDecorator:
    """(config, subject): each method on each generation. What `in_turn` leaves out is thorough."""
    return product("config, subject", methods, SUBJECTS, kept=in_turn, indirect=["subject"])


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """Each generation, as stand-in and real."""
    generation, _, kind = request.param.partition("-")
    if kind == "nunchaku":
        reason = reason_to_skip()
        if reason is not None:
            pytest.skip(reason)
        made = _real(generation)
    else:
        made = standin(request.getfixturevalue("nunchaku"), generation, flux())
    yield made
    take_off(made.transformer)
