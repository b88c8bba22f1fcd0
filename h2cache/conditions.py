"""Under which conditions a run takes place: what a calibration is good for."""

import hashlib
import json
import weakref
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


class Surroundings:
    """Where a transformer is called from: its pipeline, if it is known. Reads nothing from a device."""

    def __init__(self, transformer: torch.nn.Module, target: object):
        self._model = digest(transformer)
        self._pipe = None if target is transformer else weakref.ref(target)
        self._scheduler: tuple[object, str] | None = None

    def conditions(self, image_tokens: int) -> Conditions:
        """Of the run that a call with so many tokens belongs to."""
        pipe = self._pipe() if self._pipe is not None else None
        # Another pipeline may share the transformer: this one is at work while it has a timestep.
        if pipe is None or getattr(pipe, "current_timestep", None) is None:
            return Conditions(model=self._model, image_tokens=image_tokens)
        guidance = getattr(pipe, "guidance_scale", None)
        return Conditions(
            model=self._model,
            scheduler=self._describe(pipe.scheduler),
            steps=getattr(pipe, "num_timesteps", None),
            guidance=None if guidance is None else float(guidance),
            image_tokens=image_tokens,
        )

    def _describe(self, scheduler: object) -> str:
        if self._scheduler is None or self._scheduler[0] is not scheduler:
            self._scheduler = scheduler, described(scheduler)
        return self._scheduler[1]
