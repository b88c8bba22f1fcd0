"""Which Flux pipeline, from where, in what precision, on what device: the `model` group of configs/."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    """A pipeline and how to call it; configs/model/flux-mini.yaml says what each field means.

    A model that needs more than diffusers is a subclass: `check` says what it needs of the machine, `load` puts it
    together.
    """

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
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(self.offload in OFFLOADS, "offload", self.offload, f"one of {', '.join(OFFLOADS)}")
        require(isinstance(self.device, str), "device", self.device, "auto, cpu, cuda or cuda:N")
        for field in ("height", "width"):
            value = getattr(self, field)
            require(_is_int(value) and value > 0 and value % 16 == 0, field, value, "a positive multiple of 16")
        steps, length, guidance = self.num_inference_steps, self.max_sequence_length, self.guidance_scale
        require(_is_int(steps) and steps >= 1, "num_inference_steps", steps, "a whole number from 1")
        require(_is_int(length) and 1 <= length <= 512, "max_sequence_length", length, "a whole number from 1 to 512")
        require(is_number(guidance) and guidance >= 0, "guidance_scale", guidance, "a number from 0")

    @property
    def call_arguments(self) -> dict[str, Any]:
        """What the pipeline's `__call__` gets besides prompt and noise."""
        fields = ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length")
        return {field: getattr(self, field) for field in fields}

    def source(self) -> str:
        """The folder to load, or the hub id; UserError if `path` is no pipeline's folder."""
        if not self.path:
            return self.hub_id
        given = Path(self.path).expanduser()
        for folder in (given, REPOSITORY / given):
            if (folder / "model_index.json").is_file():
                return str(folder)
        raise UserError(
            f"model.path={self.path}: no pipeline there (a folder with a model_index.json), seen from {Path.cwd()} or "
            f"from {REPOSITORY}; restore it (git checkout) or give the folder of another Flux pipeline"
        )

    @property
    def hub_files(self) -> tuple[str, ...]:
        """What `load` reads from the hub: owner/name of a pipeline, owner/name/file of a single file."""
        return () if self.path else (self.source(),)

    @property
    def memory_advice(self) -> str:
        """What to try if the GPU's memory is too small."""
        return "use model.offload=model (or group, sequential), or a smaller model.height and model.width"

    def check(self) -> None:
        """Raise UserError if this machine cannot run the model, before anything is fetched or loaded."""
        resolve_device(self)
        self.source()

    def load(self) -> FluxPipeline:
        """The pipeline on its device, after `check`; UserError if it cannot be had."""
        return assemble(self)


def load_pipeline(config: ModelConfig) -> FluxPipeline:
    """The pipeline on its device, without progress bars; UserError if it cannot be had.

    The last one is kept, so that a sweep over thresholds, seeds or sizes loads its model once.
    """
    config.check()
    any_call = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 0.0, "max_sequence_length": 1}
    return _load(replace(config, device=str(resolve_device(config)), **any_call))


@lru_cache(maxsize=1)
def _load(config: ModelConfig) -> FluxPipeline:
    return config.load()


def assemble(config: ModelConfig, **components: Any) -> FluxPipeline:
    """The pipeline at `config.source`, with `components` instead of its own, placed as the configuration says."""
    device = resolve_device(config)
    # No bars for reading from disk (download bars stay), and no warning about what becomes a UserError or a note. What
    # transformers reports while it loads, such as weights that a folder lacks, is worth reading.
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    source = config.source()
    with explained(source, "a Flux pipeline", "path"):
        pipe = FluxPipeline.from_pretrained(source, dtype=DTYPES[config.dtype], **components)
    transformers.utils.logging.set_verbosity_error()
    pipe.set_progress_bar_config(disable=True)
    match config.offload:
        case "model":
            pipe.enable_model_cpu_offload(device=device)
        case "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        case "group":
            pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=True)
        case _:
            pipe.to(device)
    return pipe


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
    return f"{device} ({counted_threads()})"


def counted_threads() -> str:
    """Those that torch computes with on the CPU, in words."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


@contextmanager
def explained(source: str, kind: str, field: str) -> Iterator[None]:
    """Turn what loading `source`, which should be a `kind`, raises into a UserError: `model.field=` gives another."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # the caller knows what to advise
    except Exception as error:  # what a hub or a half-copied folder can raise is nobody's closed list
        raise UserError(_why_not_loaded(source, kind, field, error)) from error


def _why_not_loaded(source: str, kind: str, field: str, error: Exception) -> str:
    """One sentence: diffusers wraps the hub's errors in its own, so the reason is somewhere down the chain."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    reason = str(chain[-1]).strip().split("\n")[0]
    if Path(source).exists():
        return f"{source} does not load as {kind} ({reason}); is it complete?"
    if any(isinstance(each, GatedRepoError) for each in chain):
        page = "https://huggingface.co/" + "/".join(source.split("/")[:2])
        return (
            f"{source} needs its licence accepted at {page} and a login (`hf auth login`); "
            "without them use model=flux-mini"
        )
    if any(isinstance(each, RepositoryNotFoundError) for each in chain):
        return f"{source}: the hub has no such repository, or hides it until `hf auth login`"
    if not any(isinstance(each, OSError) for each in chain):
        return f"{source} does not load as {kind} ({reason}); see python run.py doctor=true for what is installed"
    return (
        f"cannot fetch {source} from the hub, and it is not in the local cache ({reason}): check the network, "
        f"or give a copy with model.{field}=, or use model=flux-mini"
    )


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise the ValueError of a configuration's field unless `condition`."""
    if not condition:
        raise ValueError(f"{field}={value!r} is not allowed: it must be {allowed}")


def is_number(value: object) -> bool:
    """Whether a field holds a finite number (YAML's true and false are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
