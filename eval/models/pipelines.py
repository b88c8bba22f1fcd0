"""Which pipeline, from where, in what precision, on what device, called how: the `model` group of configs/."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FluxPipeline
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from PIL import Image

from h2cache.eval.errors import UserError
from h2cache.eval.files import IS_CLONE, REPOSITORY, find_file
from h2cache.eval.models.explained import explained
from h2cache.eval.models.loading import Component, OnBytes, loaded, unwatched

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("none", "model", "sequential", "group")
# Call arguments that are the same for all calls, in the key under which a loaded pipeline is kept; others are None.
ANY_CALL = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 0.0, "max_sequence_length": 1}


@dataclass(frozen=True)
class ModelConfig:
    """A Flux pipeline and how to call it; configs/model/flux-mini.yaml says what each field means.

    A model that needs more than diffusers is a subclass: `check` says what it needs of the machine, `load` puts it
    together. So is a pipeline of another family: `DiffusersModelConfig`.

    Class attributes:
        noun: what the pipeline is called in messages.
        pipeline: the class that loads it.
        call_fields: the fields that are arguments of the pipeline's call.
        picture_argument: the argument of the call that is a picture; None: the pipeline takes none.
    """

    noun: ClassVar[str] = "Flux pipeline"
    pipeline: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    call_fields: ClassVar[tuple[str, ...]] = (
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
        "max_sequence_length",
    )
    picture_argument: ClassVar[str | None] = None

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
        steps = self.num_inference_steps
        require(_from_one(steps), "num_inference_steps", steps, FROM_ONE)
        self._check_call()

    def _check_call(self) -> None:
        """Raise ValueError for a call argument, other than sizes and steps, that is not allowed."""
        length, guidance = self.max_sequence_length, self.guidance_scale
        require(_is_int(length) and 1 <= length <= 512, "max_sequence_length", length, "a whole number from 1 to 512")
        require(_from_zero(guidance), "guidance_scale", guidance, FROM_ZERO)

    @property
    def call_arguments(self) -> dict[str, Any]:
        """What the pipeline's `__call__` gets besides prompt and noise: the call's fields that are not None."""
        values = {field: getattr(self, field) for field in self.call_fields}
        return {field: value for field, value in values.items() if value is not None}

    def arguments_with(self, picture: Path | None) -> dict[str, Any]:
        """`call_arguments`, and the RGB picture in a file under its own name; UserError as `check_picture`."""
        self.check_picture(picture)
        if picture is None:
            return self.call_arguments
        try:
            with Image.open(picture) as image:
                return self.call_arguments | {self.picture_argument: image.convert("RGB")}
        except OSError as error:
            raise UserError(f"cannot read the picture {picture}: {error.strerror or error}") from error

    def check_picture(self, picture: Path | None) -> None:
        """Raise UserError where the pipeline takes a picture and there is none, or the other way about."""
        if picture is None and self.picture_argument:
            raise UserError(f"this {self.noun} takes a picture beside the prompt, and there is none: give one")
        if picture is not None and not self.picture_argument:
            raise UserError(f"this {self.noun} takes no picture: use model=flux-mini-upscaler, or leave {picture} out")

    @property
    def makes_videos(self) -> bool:
        """Whether the pipeline is asked for a number of frames."""
        return "num_frames" in self.call_arguments

    @property
    def dtypes(self) -> torch.dtype | dict[str, torch.dtype]:
        """In what the weights are loaded: one type, or a type per component of the pipeline."""
        return DTYPES[self.dtype]

    @property
    def title(self) -> str:
        """What to call it: its folder, or its name on the hub without the owner's."""
        return Path(self.path or self.hub_id).name

    def source(self) -> str:
        """The folder to load, or the hub id; UserError if `path` is no pipeline's folder."""
        if not self.path:
            return self.hub_id
        if folder := find_folder(self.path, "model_index.json"):
            return str(folder)
        seen = f"model.path={self.path}: no pipeline there (a folder with a model_index.json), seen from {Path.cwd()}"
        if Path(self.path).parts[:1] == ("assets",) and not IS_CLONE:
            raise UserError(f"{seen}; an installed h2cache has no weights: git clone the repository and run there")
        raise UserError(
            f"{seen} or from {REPOSITORY}; restore it (git checkout) or give the folder of another {self.noun}"
        )

    @property
    def other_sources(self) -> dict[str, str]:
        """Fields that name weights besides those of `source`: the folder that each is found in, or its hub id."""
        return {}

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

    def load(self, on_bytes: OnBytes = unwatched) -> DiffusionPipeline:
        """The pipeline on its device, after `check`; UserError if it cannot be had.

        `on_bytes` hears of the weights as they come into place, once everything is downloaded.
        """
        return assemble(self, on_bytes)


@dataclass(frozen=True)
class DiffusersModelConfig(ModelConfig):
    """Any text-to-image or text-to-video pipeline of diffusers; configs/model/wan2.2-t2v-a14b.yaml explains the fields.

    A call argument that is None is not passed, so that the pipeline's own default holds.
    """

    noun: ClassVar[str] = "diffusers pipeline"
    pipeline: ClassVar[type[DiffusionPipeline]] = DiffusionPipeline
    call_fields: ClassVar[tuple[str, ...]] = (
        *ModelConfig.call_fields,
        "guidance_scale_2",
        "true_cfg_scale",
        "negative_prompt",
        "num_frames",
    )

    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    num_frames: int | None = None
    fps: int | None = None
    vae_dtype: str | None = None
    vae_tiling: bool = False

    def _check_call(self) -> None:
        for field, (allowed, words) in OPTIONAL_FIELDS.items():
            value = getattr(self, field)
            require(value is None or allowed(value), field, value, f"{words}, or null")
        require(isinstance(self.vae_tiling, bool), "vae_tiling", self.vae_tiling, "true or false")
        needed = "a whole number from 1 where num_frames is given: how fast the frames follow each other"
        require(self.num_frames is None or self.fps is not None, "fps", self.fps, needed)

    @property
    def dtypes(self) -> torch.dtype | dict[str, torch.dtype]:
        dtype = DTYPES[self.dtype]
        return dtype if self.vae_dtype is None else {"default": dtype, "vae": DTYPES[self.vae_dtype]}

    @property
    def memory_advice(self) -> str:
        return super().memory_advice + (", or fewer model.num_frames" if self.makes_videos else "")

    def load(self, on_bytes: OnBytes = unwatched) -> DiffusionPipeline:
        pipe = super().load(on_bytes)
        if self.vae_tiling:
            pipe.vae.enable_tiling()
        return pipe


@dataclass(frozen=True)
class HunyuanVideoConfig(DiffusersModelConfig):
    """HunyuanVideo with a template of its own around the prompt; configs/model/hunyuan-mini.yaml explains the field."""

    call_fields: ClassVar[tuple[str, ...]] = (*DiffusersModelConfig.call_fields, "prompt_template")

    prompt_template: Mapping[str, Any] | None = None

    def _check_call(self) -> None:
        super()._check_call()
        template = self.prompt_template
        allowed = template is None or (
            isinstance(template, Mapping)
            and set(template) == {"template", "crop_start"}
            and isinstance(template["template"], str)
            and "{}" in template["template"]
            and _is_int(template["crop_start"])
            and template["crop_start"] >= 0
        )
        needed = "a text `template` with {} where the prompt goes, and `crop_start`, a whole number from 0; or null"
        require(allowed, "prompt_template", template, needed)


def find_folder(path: str, holding: str) -> Path | None:
    """The folder of this name with a file `holding` in it, seen from where you are or else from this repository."""
    found = find_file(Path(path) / holding)
    return found and found.parent


def takes(pipe: DiffusionPipeline, argument: str) -> bool:
    """Whether the pipeline's call has a parameter of this name."""
    return argument in inspect.signature(pipe.__call__).parameters


def load_pipeline(config: ModelConfig, on_bytes: OnBytes = unwatched) -> DiffusionPipeline:
    """The pipeline on its device, without progress bars; UserError if it cannot be had.

    The last one is kept, so that a sweep over thresholds, seeds or sizes loads its model once.

    Args:
        on_bytes: as in `ModelConfig.load`.
    """
    config.check()
    any_call = {field: ANY_CALL.get(field) for field in config.call_fields}
    pipe = _load(_Order(replace(config, device=str(resolve_device(config)), **any_call), on_bytes))
    if takes(pipe, "num_frames") and not config.makes_videos:
        raise UserError(
            f"{config.source()} makes videos ({type(pipe).__name__}), and this configuration has no num_frames: use "
            "that of a video model, such as model=wan2.2-t2v-a14b"
        )
    return pipe


@dataclass(frozen=True)
class _Order:
    """What to load. Two orders of one model are equal, whoever watches."""

    config: ModelConfig
    on_bytes: OnBytes = dataclasses.field(compare=False)


@lru_cache(maxsize=1)
def _load(order: _Order) -> DiffusionPipeline:
    return order.config.load(order.on_bytes)


def assemble(config: ModelConfig, on_bytes: OnBytes, **components: Component) -> DiffusionPipeline:
    """The pipeline at `config.source`, with `components` instead of its own, placed as the configuration says."""
    device = resolve_device(config)
    source = config.source()
    with explained(source, f"a {config.noun}", "path"):
        # The hub's own bars show a download; what is passed by name is not fetched.
        here = Path(source).is_dir()
        folder = source if here else config.pipeline.download(source, **dict.fromkeys(components))
        with _one_bar():
            moved_to = device if config.offload == "none" and device.type != "cpu" else None
            pipe = loaded(config.pipeline, Path(folder), config.dtypes, moved_to, on_bytes, components)
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


@contextmanager
def _one_bar() -> Iterator[None]:
    """Neither library shows a bar of its own, and diffusers warns of nothing that becomes a UserError or a note.

    What transformers reports while it loads, such as weights that a folder lacks, is worth reading. transformers also
    turns the hub's bars off: they are on again afterwards, for what is downloaded next.
    """
    with_bars = not are_progress_bars_disabled()
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        if with_bars:
            enable_progress_bars()


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


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise the ValueError of a configuration's field unless `condition`."""
    if not condition:
        raise ValueError(f"{field}={value!r} is not allowed: it must be {allowed}")


def is_number(value: object) -> bool:
    """Whether a field holds a finite number (YAML's true and false are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _from_one(value: object) -> bool:
    return _is_int(value) and value >= 1


def _from_zero(value: object) -> bool:
    return is_number(value) and value >= 0


FROM_ONE, FROM_ZERO = "a whole number from 1", "a number from 0"
# What the optional fields of a `DiffusersModelConfig` may hold besides None, in code and in words.
OPTIONAL_FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "guidance_scale": (_from_zero, FROM_ZERO),
    "guidance_scale_2": (_from_zero, FROM_ZERO),
    "true_cfg_scale": (_from_zero, FROM_ZERO),
    "max_sequence_length": (_from_one, FROM_ONE),
    "num_frames": (_from_one, FROM_ONE),
    "fps": (_from_one, FROM_ONE),
    "negative_prompt": (lambda value: isinstance(value, str), "text"),
    "vae_dtype": (lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}"),
}
