"""Whose code caches: ours, diffusers' own caches, or cache-dit's; configs/method names one by its `_target_`.

A method of another library is a description as plain as ours: frozen, hashable, with an identity for records. Each is
put on a pipeline for one drawing and taken off again.
"""

import contextlib
import copy
import dataclasses
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline

import h2cache
from h2cache import CacheConfig
from h2cache.eval.errors import NotInstalled, UserError

OURS = "h2cache"


@dataclass(frozen=True)
class PeerCache(ABC):
    """A cache of another library: the name of its configuration's class there, and that configuration's fields.

    Class attributes:
        backend: the library.
        leaves_traces: whether it changes the pipeline for good, so that it needs a copy to work on.
    """

    backend: ClassVar[str]
    leaves_traces: ClassVar[bool] = False

    cache: str
    options: tuple[tuple[str, Any], ...]

    def identity(self) -> dict[str, Any]:
        """What an image depends on, for records."""
        return {"method": f"{self.backend}.{self.cache}", "fields": dict(self.options)}

    @abstractmethod
    def attached(self, pipe: DiffusionPipeline) -> AbstractContextManager[None]:
        """The cache on the pipeline, inside the block."""


class DiffusersCache(PeerCache):
    """One of diffusers' own caches, of a transformer with `enable_cache`."""

    backend = "diffusers"

    @contextlib.contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[None]:
        kind = getattr(diffusers, self.cache)
        pipe.transformer.enable_cache(kind(**_typed(dict(self.options)), **_callbacks(kind, pipe)))
        try:
            yield
        finally:
            pipe.transformer.disable_cache()


class CacheDitCache(PeerCache):
    """cache-dit's DBCache or DBPrune; `calibrator` names what it forecasts with, `calibration` its fields."""

    backend = "cache-dit"
    leaves_traces = True  # it replaces `__call__` of the pipeline's class

    @contextlib.contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[None]:
        import cache_dit

        options = dict(self.options)
        calibrator, calibration = options.pop("calibrator", None), dict(options.pop("calibration", ()))
        forecasts = None if calibrator is None else getattr(cache_dit, calibrator)(**calibration)
        with _quiet():
            cache_dit.enable_cache(
                pipe, cache_config=getattr(cache_dit, self.cache)(**options), calibrator_config=forecasts
            )
        try:
            yield
        finally:
            with _quiet():
                cache_dit.disable_cache(pipe)


Method = CacheConfig | PeerCache


def diffusers_cache(cache: str, **options: Any) -> DiffusersCache:
    """For configurations: a cache by the name of its class in diffusers. UserError where there is none such."""
    if not hasattr(diffusers, cache):
        raise UserError(f"diffusers {diffusers.__version__} has no {cache}")
    return DiffusersCache(cache, _frozen(options))


def cache_dit_cache(cache: str, **options: Any) -> CacheDitCache:
    """For configurations: a cache by the name of its class in cache-dit. NotInstalled where there is no cache-dit."""
    if importlib.util.find_spec("cache_dit") is None:  # importing it takes seconds
        raise NotInstalled("cache-dit is not installed: pip install cache-dit")
    return CacheDitCache(cache, _frozen(options))


def applied(pipe: DiffusionPipeline, method: Method) -> AbstractContextManager[h2cache.Handle | None]:
    """The method at work on the pipeline inside the block; its handle if it is one of ours."""
    return h2cache.apply(pipe, method) if isinstance(method, CacheConfig) else method.attached(pipe)


def backend_of(method: Method | None) -> str:
    """The library whose code caches; `none` without a cache."""
    if method is None:
        return "none"
    return OURS if isinstance(method, CacheConfig) else method.backend


def fields_of(method: Method | None) -> dict[str, Any]:
    """The fields of its configuration, for tables."""
    if method is None:
        return {}
    return dataclasses.asdict(method) if isinstance(method, CacheConfig) else dict(method.options)


def own_copy(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline with a transformer and a class of its own, for a library that leaves something on either."""
    kind = type(type(pipe).__name__, (type(pipe),), {})  # cache-dit finds out by the name what to do with it
    other = kind(**pipe.components | {"transformer": copy.deepcopy(pipe.transformer)})
    other.set_progress_bar_config(disable=True)
    return other


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _frozen(each)) for name, each in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _typed(options: dict[str, Any]) -> dict[str, Any]:
    """Options as diffusers wants them: lists where there are several values, dtypes by name."""
    made = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return {name: getattr(torch, value) if name.endswith("_dtype") else value for name, value in made.items()}


def _callbacks(kind: type, pipe: DiffusionPipeline) -> dict[str, Any]:
    """What some of diffusers' caches ask the pipeline during the run."""
    known = {
        "current_timestep_callback": lambda: pipe.current_timestep,
        "attention_weight_callback": lambda module: 1.0 - float(pipe.current_timestep) / 1000,  # rises, as in its paper
    }
    return {field.name: known[field.name] for field in dataclasses.fields(kind) if field.name in known}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without cache-dit's report of every setting that it is given."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
