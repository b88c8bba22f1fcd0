"""Under which conditions a run takes place: what a plan is good for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

TOLERANCE = 1e-3  # between two noise levels, which go from 1 to 0


class OtherConditions(ValueError):
    """A plan was to run under conditions that it was not made for; `reason` says which."""

    def __init__(self, differences: Sequence[str]):
        self.reason = f"this plan was made for {'; '.join(differences)}"
        super().__init__(
            f"{self.reason}: calibrate one for this run, or allow it with PlanConfig(plan, allow_transfer=True)"
        )


@dataclass(frozen=True)
class Conditions:
    """What a run depends on besides prompt and noise; None where it is not known.

    Fields:
        model: the transformer's or the U-Net's class and a digest of its configuration.
        scheduler: the scheduler's class and its configuration, shift and prediction type included.
        steps: denoising steps.
        guidance: the guidance scale.
        image_tokens: of one image, which is its resolution.
        sigmas: the noise level at each step, from 1 to 0; of a scheduler that is not flow matching's, what
            `plans/bases.py` makes of it.
    """

    model: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    image_tokens: int | None = None
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.sigmas is not None:  # a list in JSON
            object.__setattr__(self, "sigmas", tuple(self.sigmas))

    def differences(self, other: "Conditions") -> list[str]:
        """Where both know and do not agree, in words: what this is, and what the other is."""
        found = []
        for name in (field.name for field in fields(self) if field.name != "sigmas"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                found.append(f"{name.replace('_', ' ')} {mine} and is run with {theirs}")
        return found + self._sigma_differences(other)

    def _sigma_differences(self, other: "Conditions") -> list[str]:
        """The noise levels that are furthest apart; none where the numbers of steps differ."""
        if self.sigmas is None or other.sigmas is None or len(self.sigmas) != len(other.sigmas):
            return []
        pairs = list(zip(self.sigmas, other.sigmas, strict=True))
        step = max(range(len(pairs)), key=lambda index: abs(pairs[index][0] - pairs[index][1]))
        mine, theirs = pairs[step]
        if abs(mine - theirs) <= TOLERANCE:
            return []
        return [f"sigma {mine:.4g} at step {step} and is run with {theirs:.4g}"]


def model_of(pipe: Any) -> Any:
    """The transformer or the U-Net of a pipeline, the first of several; None where it has none."""
    parts = (getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet"))
    return next((part for part in parts if part is not None), None)


def tokens_of(latents: Any) -> int:
    """`image_tokens` of latents (B, N, C), or (B, C, ...) where each place counts as one."""
    return latents.shape[1] if latents.ndim == 3 else latents.shape[2:].numel()


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
