"""HiCache (arXiv 2508.16984): TaylorSeer's schedule, with scaled Hermite polynomials as the basis."""

from dataclasses import dataclass

from h2cache.policy.forecasts import BackcastHermite, Forecast, Hermite, ScaledTaylor

from .taylorseer import TaylorSeerConfig


@dataclass(frozen=True)
class HiCacheConfig(TaylorSeerConfig):
    """TaylorSeer with another basis: what it says about schedule, granularity and memory holds here.

    Fields beside TaylorSeer's:
        sigma: scale of the basis in (0, 1); the paper's scripts use 0.5 to 0.7. "auto": of each image its own, from how
            well its last computed step could have been forecast (before there is one to ask: 0.5); that takes one read
            from the device for each computed step. The trace and `handle.summary()` show it.
        basis: "hermite", or "taylor" with the same dual scaling of its monomials (the paper's "Taylor-Scaled").
    """

    record_name = "baselines.hicache.HiCacheConfig"

    interval: int = 5
    sigma: float | str = 0.5
    basis: str = "hermite"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("basis", ("hermite", "taylor"))
        if self.sigma != "auto":
            self._fraction("sigma", or_else=' or "auto"')
        elif self.basis != "hermite":
            self._refuse("sigma", 'a number in (0, 1) with basis = "taylor"')

    def _forecast(self) -> Forecast:
        first = self.first_enhance - 1
        if isinstance(self.sigma, str):
            return BackcastHermite(self.order, first_difference=first)
        basis = Hermite if self.basis == "hermite" else ScaledTaylor
        return basis(self.order, self.sigma, first)
