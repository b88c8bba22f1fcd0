"""ClusCa and Hi-ClusCa (arXiv 2509.10312): forecasts kept fresh by one token of each cluster."""

from dataclasses import dataclass

from h2cache.policy.clusters import Clusters
from h2cache.policy.forecasts import Forecast, Hermite, Taylor
from h2cache.policy.rules import Interval
from h2cache.policy.stages import NETWORK, ModuleStage

from .taylorseer import TaylorSeerConfig


@dataclass(frozen=True)
class ClusCaConfig(TaylorSeerConfig):
    """TaylorSeer at module granularity, with clusters on top.

    At a computed step the tokens that leave the last double block are clustered, image and text apart. At a forecast
    step one random token of each cluster goes through the MLPs of the double blocks; its value replaces the cached one
    and pulls the cached values of its cluster's image tokens towards it, before the forecast is made.

    Fields beside TaylorSeer's (whose `granularity` must be "module" here):
        clusters, iterations: of k-means; not more clusters than the image or the text has tokens.
        propagation: how far a cluster is pulled towards its fresh token, 0.005 to 0.007 on FLUX.1-dev.
        forecast, sigma: the basis, "taylor" or "hermite" (Hi-ClusCa) with the scale sigma in (0, 1).
        seed: of the random tokens and the first centroids; the same in every run.
        fresh: what the fresh tokens write: the MLP's "output", as the paper and the authors' code have it, or its
            "input", as the public diffusers port does.

    Memory: TaylorSeer's, and for each token its cluster (int64), for each cluster its centroid (float32). At
    FLUX.1-dev, 1024x1024, bfloat16 and order 1: 4.3 GB and half a megabyte. In bfloat16 a pull of 0.005 mostly rounds
    away.
    """

    record_name = "baselines.clusca.ClusCaConfig"

    interval: int = 5
    clusters: int = 16
    iterations: int = 10
    propagation: float = 0.005
    forecast: str = "taylor"
    sigma: float = 0.5
    seed: int = 0
    fresh: str = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("granularity", ("module",))
        self._integer("clusters", 1)
        self._integer("iterations", 1)
        self._fraction("propagation", closed=True)
        self._one_of("forecast", ("taylor", "hermite"))
        self._fraction("sigma")
        self._integer("seed", 0)
        self._one_of("fresh", ("output", "input"))

    def _forecast(self) -> Forecast:
        first = self.first_enhance - 1
        return Taylor(self.order, first) if self.forecast == "taylor" else Hermite(self.order, self.sigma, first)

    def compose(self) -> tuple[ModuleStage, ...]:
        clusters = Clusters(self.clusters, self.iterations, self.propagation, self.seed, inputs=self.fresh == "input")
        rule = Interval(self.interval, self.first_enhance)
        return (ModuleStage("modules", NETWORK, rule, self._forecast(), clusters=clusters),)
