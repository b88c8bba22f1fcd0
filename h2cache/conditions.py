"""Under which conditions a run takes place: what a calibration is good for."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class Conditions:
    """What a run depends on besides prompt and noise; None where it is not known.

    Fields:
        model: the transformer's class and a digest of its configuration.
        scheduler: the scheduler's class and its configuration, the shift included.
        steps: denoising steps.
        guidance: the guidance scale.
        image_tokens: of one image, which is its resolution.
    """

    model: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    image_tokens: int | None = None

    def differences(self, other: "Conditions") -> list[str]:
        """Where both know and do not agree, in words: what this is, and what the other is."""
        found = []
        for name in (field.name for field in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                found.append(f"{name.replace('_', ' ')} {mine} and is run with {theirs}")
        return found


def described(part: object) -> str:
    """The class of a model or scheduler and its configuration, without what the library notes about itself."""
    return f"{type(part).__name__} {json.dumps(_settings(part), sort_keys=True, default=str)}"


def digest(part: object) -> str:
    """The class of a model and twelve hexadecimal digits that its configuration decides."""
    text = json.dumps(_settings(part), sort_keys=True, default=str)
    return f"{type(part).__name__} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _settings(part: object) -> dict[str, Any]:
    config: Mapping[str, Any] = getattr(part, "config", {})
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


def conditions_of_call(transformer: torch.nn.Module, image_tokens: int) -> Conditions:
    """Of the run that a call of `transformer` with so many tokens belongs to, when asked on the call's own thread.

    Scheduler, steps and guidance are the calling pipeline's; None where it is no pipeline that calls. Reads nothing
    from a device.
    """
    model, pipe = digest(transformer), calling_pipeline()
    if pipe is None:
        return Conditions(model=model, image_tokens=image_tokens)
    guidance = getattr(pipe, "guidance_scale", None)
    return Conditions(
        model=model,
        scheduler=described(pipe.scheduler),
        steps=pipe.num_timesteps,
        guidance=None if guidance is None else float(guidance),
        image_tokens=image_tokens,
    )


def calling_pipeline() -> Any:
    """The innermost diffusers pipeline that is being called on this thread; None where there is none.

    What a pipeline says of itself does not tell: pipelines may share a transformer, and one that broke off still looks
    as if it ran. The stack of the thread does.
    """
    frame = inspect.currentframe()
    while frame is not None:
        # No other frame is looked into: up to Python 3.12 that keeps what its variables hold, until it ends.
        if frame.f_code.co_name == "__call__":
            caller = frame.f_locals.get("self")
            if hasattr(caller, "scheduler") and hasattr(caller, "num_timesteps"):
                return caller
        frame = frame.f_back
    return None
