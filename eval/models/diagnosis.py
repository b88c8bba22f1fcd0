"""Can nunchaku, the 4-bit engine, run here? If not, why: one sentence with the next step, before anything is fetched.

The facts are nunchaku's own: the architectures of its kernels, what its wheels are built for and how they are named
(docs/nunchaku.md says where they stand). Checked in the order in which the user can do least about them: the GPU, then
the package, then what only importing it can tell.
"""

import importlib
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from h2cache.eval.errors import UserError

RELEASES = "https://github.com/nunchaku-ai/nunchaku/releases"
OLDEST = Version("1.2")  # whose interfaces the adapters are written for
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0))
ARCHITECTURES = {(7, 0): "Volta", (7, 5): "Turing", (9, 0): "Hopper"}  # whose users ask by name
TURING = (7, 5)


@dataclass(frozen=True)
class Installation:
    """What `import nunchaku` would find, read without importing it.

    Attributes:
        folder: The package's folder.
        version: None where there is no metadata of an installed distribution, or none that can be read.
        summary: The distribution's description of itself in one line, empty without metadata.
    """

    folder: Path
    version: Version | None
    summary: str

    @property
    def cores(self) -> tuple[str, ...]:
        """File names of the compiled core, for this Python or another."""
        return tuple(sorted(file.name for file in self.folder.glob("_C*") if file.suffix in (".so", ".pyd")))

    @property
    def is_engine(self) -> bool:
        """Whether it is nunchaku the engine: other projects of the name have neither its core nor its transformers."""
        return bool(self.cores) or (self.folder / "models" / "transformers").is_dir()

    @property
    def torch(self) -> str | None:
        """The torch, as "2.11", that it is built for: nunchaku's wheels are versioned like 1.2.1+cu13.0torch2.11."""
        return self._built_for(r"torch(\d+\.\d+)")

    @property
    def cuda(self) -> str | None:
        """The CUDA, as "13.0", that it is built for; older wheels do not say."""
        return self._built_for(r"cu(\d+\.\d+)")

    def _built_for(self, pattern: str) -> str | None:
        found = re.search(pattern, (self.version.local or "") if self.version else "")
        return found[1] if found else None

    def __str__(self) -> str:
        return f"nunchaku {self.version}" if self.version else f"nunchaku at {self.folder}"


def find_installation() -> Installation | None:
    """The package called nunchaku on this Python's path, whichever project it belongs to."""
    spec = find_spec("nunchaku")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    try:
        metadata = distribution("nunchaku").metadata
        return Installation(folder, Version(metadata["Version"]), metadata.get("Summary") or "")
    except (PackageNotFoundError, InvalidVersion):
        return Installation(folder, None, "")


def require_gpu(device: torch.device) -> tuple[int, int]:
    """The compute capability of `device`; UserError if nunchaku has no kernels for it."""
    require_cuda(device, "nunchaku")
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        raise UserError(
            f"nunchaku has no kernels for {describe_gpu(device)}, only for {', '.join(map(sm, CAPABILITIES))}: "
            "on this GPU use model=flux1-dev"
        )
    return capability


def require_cuda(device: torch.device, what: str) -> None:
    """Raise UserError, saying whose kernels need one, unless `device` is a GPU."""
    if device.type == "cuda":
        return
    if torch.cuda.is_available():
        raise UserError(f"model.device={device}: the kernels of {what} run on NVIDIA GPUs only; use model.device=cuda")
    if torch.version.cuda is None:
        raise UserError(
            f"{what} needs an NVIDIA GPU and a torch built for CUDA, which torch {torch.__version__} is not: install "
            "one from https://pytorch.org/get-started/locally, or use model=flux-mini, which needs no GPU"
        )
    raise UserError(
        f"{what} needs an NVIDIA GPU, and torch {torch.__version__} finds none: run it on a machine that has one "
        "(`nvidia-smi` must show it), or use model=flux-mini, which needs none"
    )


def require_package(installation: Installation | None) -> None:
    """Raise UserError unless this is the engine, new enough, and built for this Python and this torch."""
    get_it = f"install {wanted_wheel()} from {RELEASES}"
    if installation is None:
        raise UserError(
            f"nunchaku is not installed: {get_it} (`pip install nunchaku` would install another project of that name)"
        )
    if not installation.is_engine:
        remove = "`pip uninstall nunchaku`" if installation.version else f"move {installation.folder} out of the way"
        about = f" ({installation.summary.rstrip('.')})" if installation.summary else ""
        raise UserError(f"the {installation} here{about} is another project, not the engine: {remove}, then {get_it}")
    version, cores = installation.version, installation.cores
    if version and Version(version.base_version) < OLDEST:
        raise UserError(f"{installation} is older than {OLDEST}, which H2-Cache is written for: {get_it}")
    if not cores:
        raise UserError(f"{installation} has no compiled core in {installation.folder}: {get_it}")
    if not any(core == f"_C{suffix}" for core in cores for suffix in EXTENSION_SUFFIXES):
        here = f"Python {platform.python_version()}"
        raise UserError(f"{installation} is built for another Python ({', '.join(cores)}) than this {here}: {get_it}")
    if installation.torch and installation.torch != torch_series():
        built = f"is built for torch {installation.torch}, not for the torch {torch.__version__} that is installed"
        raise UserError(f"{installation} {built}: {get_it}")
    if installation.cuda and torch.version.cuda and _major(installation.cuda) != _major(torch.version.cuda):
        built = f"is built for CUDA {installation.cuda}, and torch {torch.__version__} for CUDA {torch.version.cuda}"
        raise UserError(f"{installation} {built}: {get_it}")


def engine_attribute(module: str, name: str) -> Any:
    """`name` of nunchaku's `module`; UserError if nunchaku does not import, or has no such thing."""
    installation = find_installation()
    try:
        with quiet():
            return getattr(importlib.import_module(module), name)
    except Exception as error:  # a core built for something else can raise anything while it is initialised
        raise UserError(_why_not_imported(installation, f"{module}.{name}", error)) from error


def _why_not_imported(installation: Installation | None, wanted: str, error: Exception) -> str:
    get_it = f"install {wanted_wheel()} from {RELEASES}"
    reason = str(error).strip().split("\n")[0]
    if symbol := re.search(r"undefined symbol: (\w+)", str(error)):
        missing = f"its core misses the symbol {symbol[1]} in torch {torch.__version__}, so it was built for another"
        return f"{installation} does not load: {missing} torch; {get_it}"
    module, _, _ = wanted.rpartition(".")
    absent = isinstance(error, ModuleNotFoundError) and error.name
    if absent and not absent.startswith("nunchaku"):
        return f"{installation} needs the package {absent}, which is not installed: `pip install {absent}`"
    if isinstance(error, AttributeError) or (absent and module.startswith(absent)):
        return f"{installation} has no {wanted}, which H2-Cache is written for: {get_it}"
    return f"{installation} does not load ({type(error).__name__}: {reason}): {get_it}"


def wanted_wheel() -> str:
    """The wheel that fits this Python and torch, in words."""
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"the engine's wheel for torch {torch_series()}{cuda} and {python} (docs/nunchaku.md lists which there are)"


def describe_gpu(device: torch.device) -> str:
    """The GPU's name and architecture."""
    capability = torch.cuda.get_device_capability(device)
    family = ARCHITECTURES.get(capability)
    return f"{torch.cuda.get_device_name(device)} ({sm(capability)}{f', {family}' if family else ''})"


def sm(capability: tuple[int, int]) -> str:
    """A compute capability as CUDA's compiler writes it."""
    return "sm_{}{}".format(*capability)


def torch_series() -> str:
    """The installed torch as major.minor, the part that compiled extensions depend on."""
    return "{}.{}".format(*Version(torch.__version__).release)


def _major(version: str) -> str:
    return version.split(".")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what nunchaku prints, and without the INFO messages of everyone that its logging.basicConfig turns on."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
