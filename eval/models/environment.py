"""What numbers were made with: versions, machine, commit and command."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from h2cache.eval.files import IS_CLONE, REPOSITORY
from h2cache.eval.models.pipelines import ModelConfig, counted_threads, describe_machine, resolve_device

PACKAGES = (
    "torch torchvision diffusers transformers accelerate nunchaku numpy pandas scikit-image pillow datasets pyiqa "
    "matplotlib hydra-core ray"
).split()


def environment(command: str) -> dict[str, Any]:
    """The content of environment.json. What this machine cannot tell is None."""
    return {
        "command": command,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD") if IS_CLONE else None,
        "uncommitted_changes": _uncommitted_changes(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def machine_name(model: ModelConfig) -> str:
    """What the times of a model's images belong to: the GPU, or the CPU with its number of threads."""
    if resolve_device(model).type == "cpu":
        return f"{cpu_name()} ({counted_threads()})"
    return describe_machine(model)


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _uncommitted_changes() -> bool | None:
    """Whether the code is not quite that of the commit: tracked files count, results lying about do not."""
    command = ("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    status = _output(*command) if IS_CLONE else None
    return None if status is None else bool(status)


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, or None if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
