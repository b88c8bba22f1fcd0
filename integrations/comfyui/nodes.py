"""The nodes. ComfyUI's own modules are imported where a node needs them, so that this file imports without ComfyUI."""

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import sample_and_calibrate
from .plan_sampler import PlanTable, sample_plan

CATEGORY = "sampling/custom_sampling/h2cache"
PLAN = "H2CACHE_PLAN"
FOLDER = "h2cache_plans"  # in ComfyUI's models folder


class H2CacheLoadPlan:
    """Reads an exported plan from models/h2cache_plans."""

    RETURN_TYPES = (PLAN,)
    RETURN_NAMES = ("plan",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Reads a plan that h2cache calibrated and exported as JSON into models/h2cache_plans."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"plan_name": (sorted(plan_files()),)}}

    @classmethod
    def IS_CHANGED(cls, plan_name: str) -> str:
        """The content's digest: a file that was replaced is read again."""
        return hashlib.sha256(plan_file(plan_name).read_bytes()).hexdigest()

    def load(self, plan_name: str) -> tuple[PlanTable]:
        return (PlanTable.load(plan_file(plan_name)),)


class H2CachePlanScheduler:
    """The noise levels of a plan."""

    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"
    CATEGORY = CATEGORY
    DESCRIPTION = "The noise levels at which a plan calls the model. They are right with the plan's sampler only."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"plan": (PLAN,)}}

    def get_sigmas(self, plan: PlanTable) -> tuple[Tensor]:
        return (torch.tensor(plan.sigmas, dtype=torch.float32),)


class H2CachePlanSampler:
    """A plan as a sampler."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = "Samples with the steps and weights of a plan. For flow models: FLUX, Qwen-Image, Wan, SD3."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"plan": (PLAN,)}}

    def get_sampler(self, plan: PlanTable) -> tuple[Any]:
        return (flow_sampler(sample_plan, plan=plan),)


class H2CacheCalibrationSampler:
    """Euler's method, as a sampler that also makes a plan."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Samples with Euler's method, all steps, and writes a plan for this model and these sigmas to "
        "models/h2cache_plans. Needs h2cache in ComfyUI's Python."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        budget = {"default": 4.0, "min": 1.0, "max": 20.0, "step": 0.5, "tooltip": "how many times fewer steps"}
        return {"required": {"budget": ("FLOAT", budget), "plan_name": ("STRING", {"default": "plan.json"})}}

    def get_sampler(self, budget: float, plan_name: str) -> tuple[Any]:
        if not re.fullmatch(r"\w[\w.-]*\.json", plan_name):
            raise ValueError(f"plan_name = {plan_name!r}: must be letters, digits, `_`, `-` and `.`, and end in .json")
        return (flow_sampler(sample_and_calibrate, budget=budget, target=folder() / plan_name),)


def flow_sampler(sample: Callable[..., Tensor], **options: Any) -> Any:
    """ComfyUI's sampler object for `sample`, which refuses a model that is no flow model before it is called."""
    from comfy.samplers import KSAMPLER

    @wraps(sample)
    def sample_flow(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        refuse_unless_flow(model.inner_model.inner_model.model_sampling)
        return sample(model, x, sigmas, extra_args, callback, disable, **options)

    return KSAMPLER(sample_flow, options)


def refuse_unless_flow(model_sampling: object) -> None:
    """Nothing, for a model with denoised = x - sigma * output, which ComfyUI calls CONST.

    Raises:
        ValueError: for any other: a plan's weights are for outputs of flow models.
    """
    from comfy.model_sampling import CONST

    kind = type(model_sampling)
    if getattr(kind, "calculate_denoised", None) is not CONST.calculate_denoised:
        parts = " with ".join(base.__name__ for base in kind.__bases__)
        raise ValueError(f"an H2-Cache plan is for flow models (FLUX, Qwen-Image, Wan, SD3), and this one has {parts}")


def folder() -> Path:
    """Where ComfyUI's plans are; it need not be there."""
    import folder_paths

    return Path(folder_paths.models_dir) / FOLDER


def plan_files() -> dict[str, Path]:
    """The plans there by the names of their files."""
    return {path.name: path for path in folder().glob("*.json")}


def plan_file(name: str) -> Path:
    """The path of a plan there.

    Raises:
        ValueError: where there is none of this name.
    """
    files = plan_files()
    if name not in files:
        raise ValueError(f"models/{FOLDER} has no plan {name!r}")
    return files[name]


NODE_CLASS_MAPPINGS = {
    "H2CacheLoadPlan": H2CacheLoadPlan,
    "H2CachePlanScheduler": H2CachePlanScheduler,
    "H2CachePlanSampler": H2CachePlanSampler,
    "H2CacheCalibrationSampler": H2CacheCalibrationSampler,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "H2CacheLoadPlan": "H2-Cache: load plan",
    "H2CachePlanScheduler": "H2-Cache: plan scheduler",
    "H2CachePlanSampler": "H2-Cache: plan sampler",
    "H2CacheCalibrationSampler": "H2-Cache: calibration sampler",
}
