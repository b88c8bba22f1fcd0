"""Which Flux pipeline, from where, in what precision, on what device: the `model` group of configs/."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from eval.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("none", "model", "sequential", "group")


@dataclass(frozen=True)
class ModelConfig:
    """A pipeline and how to call it; configs/model/flux-mini.yaml says what each field means."""

    path: str | None
    hub_id: str | None
    dtype: str
    device: str
    offload: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int

    def __post_init__(self) -> None:
        if not (self.path or self.hub_id):
            raise ValueError("path or hub_id must be given: a pipeline's folder, or its name on the hub")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(self.offload in OFFLOADS, "offload", self.offload, f"one of {', '.join(OFFLOADS)}")
        _require(isinstance(self.device, str), "device", self.device, "auto, cpu, cuda or cuda:N")
        for field in ("height", "width"):
            value = getattr(self, field)
            _require(_is_int(value) and value > 0 and value % 16 == 0, field, value, "a positive multiple of 16")
        steps, length, guidance = self.num_inference_steps, self.max_sequence_length, self.guidance_scale
        _require(_is_int(steps) and steps >= 1, "num_inference_steps", steps, "a whole number from 1")
        _require(_is_int(length) and 1 <= length <= 512, "max_sequence_length", length, "a whole number from 1 to 512")
        is_number = isinstance(guidance, (int, float)) and not isinstance(guidance, bool)
        _require(is_number and 0 <= guidance < math.inf, "guidance_scale", guidance, "a number from 0")

    @property
    def call_arguments(self) -> dict[str, Any]:
        """What the pipeline's `__call__` gets besides prompt and noise."""
        fields = ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length")
        return {field: getattr(self, field) for field in fields}


def load_pipeline(config: ModelConfig) -> FluxPipeline:
    """The pipeline on its device, without progress bars; UserError if it cannot be had.

    The last one is kept, so that a sweep over thresholds or seeds loads its model once.
    """
    device = resolve_device(config)
    return _load(_source(config), config.dtype, str(device), config.offload)


def resolve_device(config: ModelConfig) -> torch.device:
    """The device that config.device names on this machine; UserError if there is none such."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device={name} is no device; choose auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices"
        raise UserError(f"model.device={name} is not there: {found}; use model.device=cpu")
    if config.offload != "none" and device.type != "cuda":
        raise UserError(f"model.offload={config.offload} needs a CUDA device, not {device}; use model.offload=none")
    return device


def describe_machine(config: ModelConfig) -> str:
    """What the times of a run belong to: the GPU's name, or the CPU with its number of threads."""
    device = resolve_device(config)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.get_num_threads()} threads)"


def _source(config: ModelConfig) -> str:
    """The folder to load, or the hub id."""
    if not config.path:
        return config.hub_id
    given = Path(config.path).expanduser()
    for folder in (given, REPOSITORY / given):
        if (folder / "model_index.json").is_file():
            return str(folder)
    raise UserError(
        f"model.path={config.path}: no pipeline there (a folder with a model_index.json), seen from {Path.cwd()} or "
        f"from {REPOSITORY}; restore it (git checkout) or give the folder of another Flux pipeline"
    )


@lru_cache(maxsize=1)
def _load(source: str, dtype: str, device: str, offload: str) -> FluxPipeline:
    # No bars for reading from disk (download bars stay), and no warning about what becomes a UserError or a note. What
    # transformers reports while it loads, such as weights that a folder lacks, is worth reading.
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    try:
        pipe = FluxPipeline.from_pretrained(source, dtype=DTYPES[dtype])
    except Exception as error:  # what a hub or a half-copied folder can raise is nobody's closed list
        raise UserError(_why_not_loaded(source, error)) from error
    transformers.utils.logging.set_verbosity_error()
    pipe.set_progress_bar_config(disable=True)
    match offload:
        case "model":
            pipe.enable_model_cpu_offload(device=device)
        case "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        case "group":
            pipe.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=True)
        case _:
            pipe.to(device)
    return pipe


def _why_not_loaded(source: str, error: Exception) -> str:
    """One sentence: diffusers wraps the hub's errors in its own, so the reason is somewhere down the chain."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    reason = str(chain[-1]).strip().split("\n")[0]
    if Path(source).is_dir():
        return f"model.path={source} does not load as a Flux pipeline ({reason}); is the folder complete?"
    if any(isinstance(each, GatedRepoError) for each in chain):
        return (
            f"{source} needs its licence accepted at https://huggingface.co/{source} and a login (`hf auth login`); "
            "without them use model=flux-mini"
        )
    if any(isinstance(each, RepositoryNotFoundError) for each in chain):
        return f"model.hub_id={source}: the hub has no such model, or hides it until `hf auth login`"
    return (
        f"cannot fetch {source} from the hub, and it is not in the local cache ({reason}): check the network, "
        "or give the folder of a copy with model.path=, or use model=flux-mini"
    )


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r} is not allowed: it must be {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
