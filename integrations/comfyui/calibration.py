"""A sampler that draws without a cache and makes a plan from what it sees. It imports h2cache when it samples.

It has the model as ComfyUI runs it: with LoRAs, quantised weights and guidance. It sees one prompt, with as many noises
as the batch has latents. `h2cache calibrate` sees many prompts, and scores schedules by their images.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

HISTORY = 3  # outputs that a step of the plan looks back on, and ...
RIDGE = 1e-4  # ... what keeps their weights small: as h2cache.calibrate has them


@torch.no_grad()
def sample_and_calibrate(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    budget: float,
    target: Path,
) -> Tensor:
    """The sample of Euler's method, as k-diffusion's `sample_euler`; writes a plan, exported, to `target`.

    The steps to compute are those of the cheapest path through the recorded run; the weights are fitted in a second
    run, which calls the model at these steps alone. The outputs of all steps are held in float32.

    Args:
        model, x, sigmas, extra_args, callback, disable: as of `sample_plan`; `sigmas` are those of a whole run.
        budget: how many times fewer calls of the model.
        target: of the plan; its folder is made.

    Raises:
        ValueError: before the model is called, for a file that is there already, sigmas that do not fall from at most 1
            to 0, and a budget that is out of range.
        ModuleNotFoundError: where there is no h2cache.
    """
    try:
        from h2cache.plans import Plan, export
        from h2cache.plans.calibrate import computed_steps
        from h2cache.plans.closed_form import even_steps
        from h2cache.plans.conditions import Conditions
        from h2cache.plans.path_cost import PathCosts
        from h2cache.plans.simulate import Simulation
        from h2cache.plans.trajectories import Trajectories
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the calibration sampler needs h2cache, and ComfyUI's Python has no {error.name}: pip install h2cache"
        ) from error
    levels, steps = sigmas.tolist(), len(sigmas) - 1
    if target.exists():
        raise ValueError(f"{target.name} is there already: choose another name for the plan")
    if not steps or not (0 < levels[0] <= 1 and levels[-1] == 0 and levels == sorted(set(levels), reverse=True)):
        raise ValueError("a plan is calibrated on a whole run of a flow model, whose sigmas fall from at most 1 to 0")
    count = computed_steps(budget, steps)

    def output(rows: slice, step: int, latents: Tensor) -> Tensor:
        denoised = model(latents, sigmas[step].expand(len(latents)), **(extra_args or {}))
        return (latents.float() - denoised.float()) / sigmas[step]

    latents, outputs = [x], []
    for i in trange(steps, disable=disable):
        x = latents[-1]
        outputs.append(output(slice(0, len(x)), i, x))
        if callback is not None:
            denoised = x - sigmas[i] * outputs[-1]
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        latents.append((x.float() + (sigmas[i + 1] - sigmas[i]) * outputs[-1]).to(x.dtype))

    grams = gram(outputs, latents)
    runs = Trajectories(
        model=output,
        conditions=Conditions(steps=steps, sigmas=tuple(levels[:-1])),
        sizes=[len(x)],
        sigmas=levels,
        latents=latents,
        grams=grams,
        decode=lambda latents: latents,
    )
    # Each image has the same weight, as in h2cache.calibrate.
    mean = (grams / grams[:, -1:, -1:].clamp_min(torch.finfo(torch.float64).tiny)).mean(0)
    schedule = PathCosts(mean.numpy(), levels, RIDGE).cheapest(count).get(count) or even_steps(steps, count)
    fitted = Simulation(runs, HISTORY, RIDGE).run(schedule)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(export.as_json(Plan(runs.conditions, schedule, fitted.weights)), encoding="utf-8")
    return latents[-1]


def gram(outputs: list[Tensor], latents: list[Tensor]) -> Tensor:
    """Inner products of the outputs and of the latents less the first, for each image, in float64.

    Returns:
        (B, 2 * steps + 1, 2 * steps + 1), as `h2cache.plans.trajectories.Trajectories.grams` has them.
    """
    vectors = [each.double().flatten(1).cpu() for each in (*outputs, *(each - latents[0] for each in latents))]
    rows = torch.stack(vectors, dim=1)
    return rows @ rows.mT
