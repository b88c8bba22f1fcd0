"""TeaCache (arXiv 2411.19108): the timestep embedding tells how much the output will change."""

import math
from dataclasses import dataclass

from h2cache.config import CacheConfig
from h2cache.policy.forecasts import Taylor
from h2cache.policy.probes import ModulatedInput
from h2cache.policy.rules import Accumulated
from h2cache.policy.stages import NETWORK, BlockStage

# The authors' fit for FLUX.1; highest power first.
FLUX_COEFFICIENTS = (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)


@dataclass(frozen=True)
class TeaCacheConfig(CacheConfig):
    """One stage, the whole network, decided about before any block runs.

    The relative L1 change, from each step to the next, of the input of the first block as the timestep modulates it
    (the first output of its first norm) is rescaled by a polynomial and added up; while the sum stays below `threshold`
    all blocks are replaced by the residual that they added at the last computed step, and a computed step starts the
    sum again. The first and the last step always compute.

    Fields:
        threshold: larger skips more; negative never skips. On FLUX.1-dev 0.25 gives about 1.5x, 0.4 1.8x, 0.6 2.0x, 0.8
            2.25x (the authors' figures).
        coefficients: the polynomial, highest power first. The default is FLUX.1's and is refused on other families;
            `python -m tools.fit_teacache` fits one to a model.
        num_steps: denoising steps of a run. None finds the last step out: from the end of the scheduler's table of
            timesteps where the model is given views of it, else from the timesteps themselves, which works for runs of
            three steps and more with the even spacing that Flux pipelines use. Give it where you use another schedule.
        batch_decision: see `CacheConfig`.

    Memory per image and guidance branch, with N image and M text tokens of width D: the residual, (N, D) and (M, D),
    in the model's dtype, and the modulated input, (N, D) in float32. At FLUX.1-dev, 1024x1024, bfloat16: 28 MB and
    50 MB.
    """

    record_name = "baselines.teacache.TeaCacheConfig"

    threshold: float = 0.4
    coefficients: tuple[float, ...] = FLUX_COEFFICIENTS
    num_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._threshold("threshold")
        object.__setattr__(self, "coefficients", tuple(self.coefficients))
        numbers = [isinstance(c, int | float) and math.isfinite(c) for c in self.coefficients]
        if not numbers or not all(numbers):
            self._refuse("coefficients", "one or more finite numbers, highest power first")
        self._integer("num_steps", 1, optional=True)

    def compose(self) -> tuple[BlockStage, ...]:
        network = BlockStage(
            name="network",
            roles=NETWORK,
            probe=ModulatedInput(fitted_for="FLUX.1" if self.coefficients == FLUX_COEFFICIENTS else None),
            rule=Accumulated(self.threshold, self.coefficients, self.num_steps),
            forecast=Taylor(0),
        )
        return (network,)
