"""Which model drew an image, so that images of another are never taken for its own."""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from h2cache.eval.models.pipelines import ModelConfig

# What says where a model is kept and computed, or is counted with each image. A table can be made again elsewhere.
ELSEWHERE = ("path", "hub_id", "device", "offload", "num_inference_steps")
WHOLE = 2**26  # bytes up to which a file is read in full
SAMPLES = 64  # of a larger file: this many pieces, evenly spaced, first and last included
PIECE = 2**16  # bytes


def identity(config: ModelConfig) -> dict[str, Any]:
    """What an image depends on besides prompt, seed, steps and method.

    What lies in files counts by content, wherever it lies; what the hub holds, by name.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in ELSEWHERE}
    parts = {"weights": config.source(), **values, **config.other_sources}
    return {"class": type(config).__name__, **{name: _by_content(value) for name, value in parts.items()}}


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or over the names and contents of a pipeline's folder; above `WHOLE` bytes, of samples of it.

    Hidden files, pictures and notes beside the weights do not count.
    """
    total = hashlib.sha256()
    if path.is_file():
        _add(total, path)
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and file.suffix not in (".md", ".png") and not any(p.startswith(".") for p in name.parts):
            total.update(f"{name.as_posix()}\n".encode())
            _add(total, file)
    return f"sha256:{total.hexdigest()}"


def _by_content(value: Any) -> Any:
    """A value as JSON has it, with the hash of the content instead of a path."""
    if isinstance(value, str) and "/" in value and Path(value).expanduser().exists():
        return content_hash(Path(value).expanduser())
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _add(total: "hashlib._Hash", file: Path) -> None:
    size = file.stat().st_size
    total.update(f"{size}\n".encode())
    with file.open("rb") as content:
        if size <= WHOLE:
            total.update(content.read())
            return
        for k in range(SAMPLES):
            content.seek(k * (size - PIECE) // (SAMPLES - 1))
            total.update(content.read(PIECE))
