"""cache-dit's DBCache, swept: alone, and with each of the calibrators of the installed version."""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import cache_dit
from diffusers import FluxPipeline

from .contender import Contender, described

LIBRARY = "cache-dit"
ALWAYS = 1.0  # the residual_diff_threshold that it reads as: skip whenever the other limits allow
CALIBRATORS: dict[str, tuple[tuple[str | None, dict[str, Any]], ...]] = {
    "DBCache": ((None, {}),),
    "DBCache + TaylorSeer": (
        ("TaylorSeerCalibratorConfig", dict(taylorseer_order=1)),
        ("TaylorSeerCalibratorConfig", dict(taylorseer_order=2)),
    ),
    "DBCache + FoCa": (("FoCaCalibratorConfig", {}),),
    "DBCache + DMD": (("DMDCalibratorConfig", {}),),
}
MASKS = ("slow", "medium", "fast", "ultra")  # its own names of step masks


def contenders(steps: int) -> Iterator[Contender]:
    """Every policy with every calibrator that is there; `steps` of a run, which its masks are made for."""
    for method, calibrators in CALIBRATORS.items():
        for calibrator, options in calibrators:
            if calibrator is None or hasattr(cache_dit, calibrator):
                for shown, fields in _policies(steps):
                    attach = partial(_enabled, fields, calibrator, options)
                    yield Contender(LIBRARY, method, described(**options, **shown), attach)
    for threshold, warmup in product((0.05, 0.1, 0.2, 0.4), (2, 6)):
        shown = dict(threshold=threshold, warmup=warmup)
        fields = dict(Fn_compute_blocks=1, residual_diff_threshold=threshold, max_warmup_steps=warmup)
        yield Contender(LIBRARY, "DBPrune", described(**shown), partial(_pruned, fields))


def missing() -> dict[str, str]:
    """Calibrators that the installed version lacks."""
    return {
        f"cache-dit {method}": f"version {cache_dit.__version__} has no {calibrator}"
        for method, calibrators in CALIBRATORS.items()
        for calibrator, _ in calibrators
        if calibrator is not None and not hasattr(cache_dit, calibrator)
    }


def _policies(steps: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What is shown, and the fields of DBCacheConfig: a threshold; a fixed number of skips; its masks of steps."""
    for threshold, warmup in product((0.05, 0.08, 0.12, 0.18, 0.26), (2, 6)):
        yield (
            dict(threshold=threshold, warmup=warmup),
            dict(Fn_compute_blocks=1, residual_diff_threshold=threshold, max_warmup_steps=warmup),
        )
    for most, warmup, last in product((1, 2, 3, 4, 5, 6, 8), (3, 6), (0, 1)):
        yield (
            dict(skips=most, warmup=warmup, Bn=last),
            dict(
                Fn_compute_blocks=1,
                Bn_compute_blocks=last,
                residual_diff_threshold=ALWAYS,
                max_warmup_steps=warmup,
                max_continuous_cached_steps=most,
            ),
        )
    for mask in MASKS:
        yield (
            dict(mask=mask),
            dict(
                Fn_compute_blocks=1,
                num_inference_steps=steps,
                steps_computation_mask=cache_dit.steps_mask(total_steps=steps, mask_policy=mask),
                steps_computation_policy="static",
            ),
        )


@contextlib.contextmanager
def _enabled(
    fields: dict[str, Any], calibrator: str | None, options: dict[str, Any], pipe: FluxPipeline
) -> Iterator[None]:
    calibration = None if calibrator is None else getattr(cache_dit, calibrator)(**options)
    with _attached(pipe, cache_dit.DBCacheConfig(**fields), calibration):
        yield


@contextlib.contextmanager
def _pruned(fields: dict[str, Any], pipe: FluxPipeline) -> Iterator[None]:
    with _attached(pipe, cache_dit.DBPruneConfig(**fields), None):
        yield


@contextlib.contextmanager
def _attached(pipe: FluxPipeline, cache: object, calibration: object | None) -> Iterator[None]:
    with _quietly():
        cache_dit.enable_cache(pipe, cache_config=cache, calibrator_config=calibration)
    try:
        yield
    finally:
        with _quietly():
            cache_dit.disable_cache(pipe)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without its report of every setting that it is given."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
