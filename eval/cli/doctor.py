"""What is on this machine, and which models can run on it: `python run.py doctor=true`.

Everything is read here: nothing is downloaded, no weights are loaded, the hub is not asked. Memory is compared with
what the weights alone take (configs/memory.yaml), so that a model that fits by a little may not run.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants, get_token, try_to_load_from_cache
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS
from h2cache.eval.models.diagnosis import find_installation, require_package, sm
from h2cache.eval.models.pipelines import ModelConfig, describe_machine, resolve_device

STYLES = {"yes": "green", "after a download": "yellow", "no": "red"}
MODELS = CONFIGS / "model"
LIBRARIES = ("diffusers", "transformers", "accelerate", "huggingface_hub", "peft", "kernels", "bitsandbytes")
GIB, GB = 2**30, 10**9
DRIVER_SECONDS = 10  # nvidia-smi hangs where a GPU is gone


def show(console: Console) -> None:
    """Print the state of the machine, one fact a row, and under it which models of configs/model can run, and why."""
    facts, models = _grid(), _grid()
    for name, value in machine():
        facts.add_row(name, Text(value))
    for (verdict, reason), names in verdicts().items():
        models.add_row(Text(verdict, STYLES[verdict]), Text("\n").join([Text(", ".join(names), "bold"), Text(reason)]))
    console.print(Padding(Group(facts, "", models), (1, 0, 0, 2), expand=False))


def verdicts() -> dict[tuple[str, str], list[str]]:
    """(whether a model can run here, why) -> the models of configs/model of which that is true, what can run first."""
    known = OmegaConf.load(CONFIGS / "memory.yaml")
    found = {}
    for file in MODELS.glob("*.yaml"):
        config = instantiate(OmegaConf.load(file), _convert_="all")
        weights = known.get(file.stem)
        found[file.stem] = too_large(config, weights.all, weights.largest) if weights else None
        found[file.stem] = found[file.stem] or examine(config)
    order = sorted(found.items(), key=lambda item: (list(STYLES).index(item[1][0]), item))
    groups: dict[tuple[str, str], list[str]] = {}
    for name, answer in order:
        groups.setdefault(answer, []).append(name)
    return groups


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def machine() -> Iterator[tuple[str, str]]:
    """(what, how it stands), from the interpreter down to the hub."""
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB if hasattr(os, "sysconf") else None
    has = f", {memory:.1f} GiB of memory" if memory else ""
    yield "CPU", f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}{has}"
    yield "torch", f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
    gpus = range(torch.cuda.device_count())
    for index in gpus:
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, {sm((gpu.major, gpu.minor))}, {gpu.total_memory / GIB:.1f} GiB"
    if not gpus:
        yield "GPU", "none that torch finds"
    yield "driver", _driver()
    yield "libraries", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    yield "nunchaku", _nunchaku()
    yield "hub", _hub()


def examine(config: ModelConfig) -> tuple[str, str]:
    """(one of STYLES, why): whether the model can run here, as far as the machine and the local cache can tell."""
    try:
        config.check()
        missing = [name for name in config.hub_files if not is_cached(name)]
    except UserError as error:
        return "no", str(error)
    where = f"on {describe_machine(config)}"
    if not missing:
        return "yes", f"{where}, from {'the local cache' if config.hub_files else config.path}"
    what = " and ".join(missing)
    if constants.HF_HUB_OFFLINE:
        return "no", f"not in the local cache: {what}; HF_HUB_OFFLINE is set: unset it, or use model=flux-mini"
    login = "" if get_token() else "; one whose terms must be accepted needs a login (`hf auth login`)"
    return "after a download", f"{where}, not in the local cache: {what}{login}"


def too_large(config: ModelConfig, whole: float, largest: float) -> tuple[str, str] | None:
    """A verdict where the weights do not fit into memory, and what helps; None where they do.

    Args:
        config: the model.
        whole: all weights, GB.
        largest: those of the largest part, GB.
    """
    try:
        device = resolve_device(config)
        if device.type == "cuda":
            where, room = "the GPU", torch.cuda.get_device_properties(device).total_memory / GB
        else:
            where, room = "the machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    except (UserError, RuntimeError, AssertionError, AttributeError):
        return None  # no such device, which `examine` says; a driver that is gone; a system that does not tell
    needed = whole if config.offload == "none" else largest
    if config.offload in ("sequential", "group") or needed <= room:
        return None
    advice = "use another machine"
    if device.type == "cuda":
        fits = config.offload == "none" and largest <= room
        advice = f"use model.offload=model ({largest:g} GB at a time)" if fits else "use model.offload=group"
    return "no", f"the weights take {needed:g} GB and {where} has {room:.1f} GB: {advice}"


def is_cached(name: str) -> bool:
    """Whether the hub's owner/name (a pipeline), or owner/name/file, lies in the local cache."""
    owner, repository, *file = name.split("/")
    found = try_to_load_from_cache(f"{owner}/{repository}", "/".join(file) or "model_index.json")
    return isinstance(found, str)


def _nunchaku() -> str:
    """What the package is, and if it cannot be used, why not; what the GPU has to say stands with the models."""
    installation = find_installation()
    try:
        require_package(installation)
    except UserError as error:
        return str(error)
    return f"{installation.version or 'without a version'} in {installation.folder}"


def _driver() -> str:
    """NVIDIA's driver, as nvidia-smi tells."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "none found (no nvidia-smi)"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    return ", ".join(sorted(set(answer.stdout.split()))) or "nvidia-smi knows no GPU"


def _hub() -> str:
    """Where models come from: the mode, the login, and what is in the cache."""
    mode = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
    login = "logged in" if get_token() else "no login"
    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*")))
    return f"{mode}, {login}, {models} repositories in {cache}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
