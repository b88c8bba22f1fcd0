"""H2-Cache (arXiv 2510.27171): structure and detail stages, each with its own threshold, under a hierarchy."""

from dataclasses import dataclass

from .config import CacheConfig
from .policy.forecasts import Forecast, Hermite, Taylor
from .policy.probes import FirstBlockResidual
from .policy.rules import Threshold
from .policy.stages import DETAIL, STRUCTURE, BlockStage


@dataclass(frozen=True)
class H2CacheConfig(CacheConfig):
    """Two cached stages: structure (Flux: the double-stream blocks) and detail (Flux: the single-stream blocks).

    Each stage runs its first block, compares that block's residual with the one of the last step at which the stage was
    computed, and, when the relative L1 difference is strictly below the stage's threshold, replaces its other blocks by
    their last residual (sections 3 and 4 of the paper). The defaults at batch 1 are the published method.

    Fields:
        tau1, tau2: thresholds of structure and detail; larger skips more, negative never skips.
        pool1, pool2: target number of tokens of the pooled features (PFS), None for no pooling.
        hierarchical: a skipped structure stage skips the detail stage of that step as well, without comparing.
        forecast: "reuse" the last residual, or extrapolate it by "taylor" (arXiv 2503.06923) or "hermite" (2508.16984).
        order, sigma: order of the extrapolation, and the scale in (0, 1) of the Hermite basis.
        warmup_steps: first calls of a run that always compute.
        max_consecutive_hits: skips in a row after which a stage computes; None for no limit.
        pieces: so many equal pieces along the pooled tokens are compared each by itself, and the one that changed most
            decides; 1, the published method, compares them as one. A video's tokens come frame after frame, so that
            pieces are blocks of frames; with the text in front in the detail stage.
        split: where a model has one block list, the fraction of it that is structure, in (0, 1); the rest is detail. By
            default FLUX.1's share, 19 of 57 blocks. Models with two lists have no use for it.
        stages: "both", or only "structure" or only "detail" (the functional-separation study).
        batch_decision: see `CacheConfig`.

    Memory per image and guidance branch, with N image and M text tokens of width D: residuals (N, D) and (M, D) for
    each of the two stages, `order + 1` times when forecasting, in the model's dtype; and two pooled references in
    float32. At FLUX.1-dev, 1024x1024, bfloat16: 2 x 4608 x 3072 numbers, 57 MB, and 13 MB of references.
    """

    record_name = "h2cache.h2.H2CacheConfig"
    added_fields = ("split", "pieces")

    tau1: float = 0.15
    tau2: float = 0.22
    pool1: int | None = 2048
    pool2: int | None = 384
    hierarchical: bool = True
    forecast: str = "reuse"
    order: int = 1
    sigma: float = 0.5
    warmup_steps: int = 1
    max_consecutive_hits: int | None = None
    stages: str = "both"
    split: float = 1 / 3
    pieces: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._threshold("tau1")
        self._threshold("tau2")
        self._integer("pool1", 1, optional=True)
        self._integer("pool2", 1, optional=True)
        self._flag("hierarchical")
        self._one_of("forecast", ("reuse", "taylor", "hermite"))
        self._integer("order", 1)
        self._fraction("sigma")
        self._integer("warmup_steps", 1)
        self._integer("max_consecutive_hits", 1, optional=True)
        self._one_of("stages", ("both", "structure", "detail"))
        self._fraction("split")
        self._integer("pieces", 1)

    @property
    def split_fraction(self) -> float:
        return self.split

    def _forecast(self) -> Forecast:
        forecasts: dict[str, Forecast] = {
            "reuse": Taylor(0),
            "taylor": Taylor(self.order),
            "hermite": Hermite(self.order, self.sigma),
        }
        return forecasts[self.forecast]

    def _rule(self, threshold: float) -> Threshold:
        return Threshold(threshold, self.warmup_steps, self.max_consecutive_hits)

    def compose(self) -> tuple[BlockStage, ...]:
        both = self.stages == "both"
        structure = BlockStage(
            name="structure",
            roles=(STRUCTURE,),
            probe=FirstBlockResidual(pool=self.pool1, pieces=self.pieces),
            rule=self._rule(self.tau1),
            forecast=self._forecast(),
        )
        detail = BlockStage(
            name="detail",
            roles=(DETAIL,),
            probe=FirstBlockResidual(with_text=True, pool=self.pool2, pieces=self.pieces),
            rule=self._rule(self.tau2),
            forecast=self._forecast(),
            parent="structure" if both and self.hierarchical else None,
        )
        return (structure, detail) if both else (structure,) if self.stages == "structure" else (detail,)
