"""A plan as a diffusers scheduler: the pipeline's loop calls the model at the computed steps alone."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from .bases import FlowForm, check_base, class_of, has_own_step, kind_of
from .conditions import Conditions, described, tokens_of
from .plan import Plan

if TYPE_CHECKING:
    from .handle import PlanHandle


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """Computes the steps of a plan, and makes the skipped steps up to the next computed one in the same `step`.

    Sample, noise level and output are taken in the terms of flow matching (`plans/bases.py`), where a step of the run
    from noise level tau to the next adds `(next tau - tau) * v` to the sample. At a computed step v is the model's
    output. At a skipped one, and at a computed one with weights of the plan, it is `sum_k weights[k] * v_k`, where v_0
    is the newest output. The sum is made in float32. A step without weights, and with no skipped step after it, is the
    base scheduler's, bit for bit, where sample and output have one dtype; of a multistep base, that of first order. The
    output is taken as the pipeline hands it over, after guidance.

    `timesteps` has the m computed timesteps, `sigmas` their noise's sigmas and the last one; `begin_index` and
    `step_index` count in these. `num_inference_steps` is the number of steps of the whole run. Where a run starts in
    the middle (image-to-image, inpainting), weights of outputs that were not computed fall on the newest. Pipelines
    find that start from the length of `timesteps`, so that a strength of 0.6 runs 60 % of the computed steps.

    Between two calls of `step` at most `plan.history - 1` outputs are held, in the model's dtype, or in float32 where
    the base is not flow matching's. At FLUX.1-dev, 1024x1024, bfloat16, each is 0.5 MB an image. They are freed with
    the last step; those of a run that broke off with the next `set_timesteps`. Like any scheduler it serves one run at
    a time.

    The plan is in `config`, which also has all settings of the base scheduler. To load a saved pipeline with it, import
    this class first.
    """

    base: Any
    order = 1

    def __init__(
        self,
        plan: Plan | Mapping[str, Any] | str | Path,
        base: SchedulerMixin | None = None,
        allow_transfer: bool = False,
    ):
        """Follow `plan` with the steps of `base`.

        Args:
            plan: a Plan, its JSON as a dict, or the path of its file.
            base: a scheduler of one of the classes in `plans/bases.py`, which is copied; by default a
                FlowMatchEulerDiscreteScheduler with diffusers' defaults.
            allow_transfer: see `PlanConfig`.

        Raises:
            TypeError: for another scheduler.
            ValueError: for a scheduler that adds noise at each step or is not linear, and for what is no plan.
        """
        if base is None:
            base = FlowMatchEulerDiscreteScheduler()
        elif isinstance(base, PlanScheduler):
            base = base.base
        check_base(base)
        self.base = copy.deepcopy(base)
        settings = {name: value for name, value in base.config.items() if not name.startswith("_")}
        self.register_to_config(**settings, base_class=kind_of(base).__name__)
        self.use(plan_of(plan), allow_transfer)
        self.watcher: PlanHandle | None = None
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor = self.base.timesteps
        self.sigmas: Tensor = getattr(self.base, "sigmas", self.timesteps)  # of the run, once it has begun
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._counts_steps = False  # the caller knows the number of steps, and not that of `timesteps`
        self.reset()

    def use(self, plan: Plan, allow_transfer: bool) -> None:
        """Follow `plan` from the next run on."""
        self.plan = plan
        self.allow_transfer = allow_transfer
        self.register_to_config(plan=json.loads(plan.to_json()), allow_transfer=allow_transfer)

    def reset(self) -> None:
        """Forget the outputs of the run in progress."""
        self._history: tuple[Tensor, ...] = ()
        self._has_begun = False

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **changes: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """From the config of a PlanScheduler, or from that of another scheduler and `plan=`.

        Raises:
            TypeError: for the config of a scheduler that a plan cannot follow, and where there is no plan.
        """
        own: dict[str, Any] = {"plan": None, "allow_transfer": False, "base_class": config.get("_class_name")}
        own |= {name: value for name, value in {**config, **changes}.items() if name in own}
        settings = {name: value for name, value in config.items() if name not in own and not name.startswith("_")}
        kind = class_of(own["base_class"], settings.keys())
        if own["plan"] is None:
            raise TypeError("this config has no plan: PlanScheduler.from_config(config, plan=plan)")
        others = {name: value for name, value in changes.items() if name not in own}
        base, unused = kind.from_config(settings, return_unused_kwargs=True, **others)
        made = cls(own["plan"], base, own["allow_transfer"])
        return (made, unused) if return_unused_kwargs else made

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to nobody: some pipelines copy their scheduler for a second modality."""
        return {**vars(self), "watcher": None}

    def __len__(self) -> int:
        return len(self.base)

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """What noise is multiplied by to begin with."""
        return getattr(self.base, "init_noise_sigma", 1.0)

    @property
    def begin_index(self) -> int | None:
        """Of `timesteps`, the one that the run starts at; None: the one that the first `step` is given."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Of `timesteps`, the one that comes next; None before the first `step`."""
        return self._step_index

    def set_shift(self, shift: float) -> None:
        """Set the base scheduler's shift."""
        self.base.set_shift(shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Begin a run: take the base scheduler's timesteps, and keep those of the computed steps.

        The arguments are the base scheduler's.

        Raises:
            ValueError: where the plan was made for other conditions, unless transfer is allowed.
        """
        self.reset()
        self._begin_index = self._step_index = self.num_inference_steps = None
        # On the host, so that the strides are known without a read from the device.
        asked = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        self.base.set_timesteps(num_inference_steps, **{name: each for name, each in asked.items() if each is not None})
        self._form = FlowForm.of(self.base)
        steps = self._form.steps
        known = Conditions(scheduler=described(self.base), steps=steps, sigmas=self._form.levels[:-1])
        self._run_plan = self.plan.under(known, self.allow_transfer)
        if self.watcher is not None:
            self._run_plan.under(self.watcher.conditions(), self.allow_transfer)
        computed = list(self._run_plan.computed)
        self.timesteps = self.base.timesteps[computed].to(device)
        self._scales = torch.tensor([self._form.scales[step] for step in (*computed, steps)])
        self.sigmas = (torch.tensor([self._form.levels[step] for step in (*computed, steps)]) * self._scales).to(device)
        self.num_inference_steps = steps
        self._counts_steps = sigmas is None and timesteps is None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at an entry of `timesteps`.

        Raises:
            ValueError: where the caller counts steps that are not in `timesteps`, so that it would start elsewhere.
        """
        counted = self.num_inference_steps if self._counts_steps else None
        if begin_index and counted is not None and len(self.timesteps) < counted:
            raise ValueError(
                f"this pipeline counts {counted} steps and starts at step {begin_index}, but a plan "
                f"leaves {len(self.timesteps)} timesteps: pass it sigmas= in the place of num_inference_steps="
            )
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of a timestep in `timesteps`; the second, where there are several, as in diffusers."""
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return (timesteps == timestep).nonzero()[:2][-1].item()

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The sample as the model takes it, by the base scheduler."""
        if not hasattr(self.base, "scale_model_input"):
            return sample
        self.base._step_index = self._run_plan.computed[self._next(timestep)]
        return self.base.scale_model_input(sample, timestep)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Clean samples with the noise of a timestep: `sigma * noise + alpha * sample`.

        Args:
            sample, noise: (B, ...).
            timestep: (B,) or (1,). Without a begin index it says which sigma; with one, sigma is that of the step to
                come.
        """
        if self._begin_index is None:
            places = [self.index_for_timestep(each.to(self.timesteps.device)) for each in timestep]
        else:
            places = [self._begin_index if self._step_index is None else self._step_index] * len(timestep)
        sigma, scale = (each.to(sample.device, sample.dtype)[places] for each in (self.sigmas, self._scales))
        sigma, scale = (each.view(-1, *[1] * (sample.ndim - 1)) for each in (sigma, scale))
        return sigma * noise + (scale - sigma) * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise`, as pipelines of other schedulers than flow matching's call it."""
        return self.scale_noise(original_samples, timesteps, noise)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        eta: float = 0.0,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the next computed timestep, or at the end of the run.

        Args:
            model_output: (B, ...), at `timestep`.
            timestep: an entry of `timesteps`.
            sample: (B, ...), of which the result has shape and dtype.
            generator: not used; no noise is added.
            eta: 0; a pipeline hands it on.
            return_dict: False for a tuple of one.

        Raises:
            ValueError: before `set_timesteps`, after the last timestep, for an eta, and where the first step shows
                another resolution than the plan was made for.
        """
        if eta:
            raise ValueError(f"a plan cannot follow steps with eta={eta}, which add noise: it must be 0")
        index = self._next(timestep)
        if not self._has_begun:
            self._run_plan.under(Conditions(image_tokens=tokens_of(sample)), self.allow_transfer)
        steps, form = self._run_plan.segment(index), self._form
        velocity = form.velocity(steps.start, sample, model_output)
        if len(steps) == 1 and steps.start not in self._run_plan.weights and has_own_step(self.base):
            self.base._step_index = steps.start
            output = model_output.to(sample.dtype)
            (moved, *_) = self.base.step(output, self.base.timesteps[steps.start], sample, return_dict=False)
        else:
            outputs = (velocity, *self._history)
            moved, strides = (
                form.scaled(steps.start, sample.float()),
                self._run_plan.strides(index, form.levels, len(outputs)),
            )
            for stride, output in zip(strides, outputs, strict=False):
                moved = torch.add(moved, output, alpha=stride)  # in float32, whatever the output has
            moved = form.unscaled(steps.stop, moved)
        is_last, is_first = index + 1 == len(self.timesteps), not self._has_begun
        kept = 0 if is_last else self._run_plan.history - 1
        # A copy: the output is the caller's, who may write to it.
        self._history = (velocity.clone(), *self._history)[:kept] if kept else ()
        self._step_index, self._has_begun = index + 1, True
        if self.watcher is not None:
            timesteps = self.base.timesteps[steps.start : steps.stop].tolist()
            self.watcher.note(steps, timesteps, len(sample), is_first)
        moved = moved.to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _next(self, timestep: float | Tensor) -> int:
        """The place in `timesteps` of the step to come; see `step` for what is raised."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        index = self._step_index if self._step_index is not None else self._begin_index
        if index is None:
            index = self.index_for_timestep(timestep)
        if index >= len(self.timesteps):
            raise ValueError(f"the run of {len(self.timesteps)} timesteps is over: call set_timesteps for another")
        return index

    def held_bytes(self) -> int:
        """Bytes of the outputs that are held at this moment."""
        return sum(output.nbytes for output in self._history)


def plan_of(plan: Plan | Mapping[str, Any] | str | Path) -> Plan:
    """A plan, whether it is given as one, as the dict that a config holds, or by its file."""
    if isinstance(plan, Plan):
        return plan
    return Plan.from_json(json.dumps(plan)) if isinstance(plan, Mapping) else Plan.load(plan)
