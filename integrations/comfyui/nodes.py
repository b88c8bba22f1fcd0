"""The nodes. ComfyUI's own modules are imported where a node needs them, so that this file imports without ComfyUI."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        from comfy.samplers import KSAMPLER

        return (KSAMPLER(sample_flow, {"plan": plan}),)


def sample_flow(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    plan: PlanTable,
) -> Tensor:
    """`sample_plan` for the model that ComfyUI's KSAMPLER passes.

    Raises:
        ValueError: for a model that is no flow model, before it is called; and where `sigmas` are not the plan's.
    """
    refuse_unless_flow(model.inner_model.inner_model.model_sampling)
    return sample_plan(model, x, sigmas, extra_args, callback, disable, plan=plan)


def refuse_unless_flow(model_sampling: object) -> None:
    """Nothing, for a model with x = (1 - sigma) * clean + sigma * noise and denoised = x - sigma * output.

    Raises:
        ValueError: for any other: a plan's weights are for outputs of flow models.
    """
    from comfy.model_sampling import CONST

    kind = type(model_sampling)
    if any(getattr(kind, name, None) is not getattr(CONST, name) for name in ("calculate_denoised", "noise_scaling")):
        parts = " with ".join(base.__name__ for base in kind.__bases__)
        raise ValueError(f"an H2-Cache plan is for flow models (FLUX, Qwen-Image, Wan, SD3), and this one has {parts}")


def plan_files() -> dict[str, Path]:
    """The files in models/h2cache_plans by their name."""
    import folder_paths

    return {path.name: path for path in (Path(folder_paths.models_dir) / FOLDER).glob("*.json")}


def plan_file(name: str) -> Path:
    """A file in models/h2cache_plans.

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
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "H2CacheLoadPlan": "H2-Cache: load plan",
    "H2CachePlanScheduler": "H2-Cache: plan scheduler",
    "H2CachePlanSampler": "H2-Cache: plan sampler",
}
