"""`apply` and the handle that it returns."""

import logging
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from torch import nn

from .adapters import adapter_of, transformers_of
from .adapters.other_caches import refuse_hooked_caches, refuse_other_caches
from .config import CacheConfig
from .runtime.engine import Engine
from .runtime.interception import interception_of, is_compiled
from .runtime.layout import lay_out
from .trace import Trace

logger = logging.getLogger("h2cache")


class Handle(ABC):
    """What `h2cache.apply` put on a pipeline or a transformer: its record, its settings, its end.

    Also a context manager, which removes the method at its end.
    """

    def __init__(self) -> None:
        self._trace = Trace()

    @property
    def trace(self) -> Trace:
        """Every decision of the last runs. Each of two transformers has runs of its own."""
        return self._trace

    def summary(self) -> dict[str, Any]:
        """What the trace adds up to; see `Trace.summary`."""
        return self._trace.summary()

    @abstractmethod
    def attach(self) -> None:
        """Put the method in its place. `apply` does, once."""

    @property
    @abstractmethod
    def config(self) -> CacheConfig:
        """The settings in force."""

    @abstractmethod
    def update(self, **changes: Any) -> None:
        """Change settings.

        Raises:
            ValueError: for an unknown field or a value out of range; nothing is changed.
            RuntimeError: if the method was removed or replaced.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget every run in progress."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that are held at this moment; zero once the denoising loop is over."""

    @abstractmethod
    def remove(self) -> None:
        """Leave everything as it was before `apply`. The trace stays readable. Idempotent."""

    def __repr__(self) -> str:
        counts = self.summary()
        return f"<{type(self).__name__} of {self.config}: runs {counts['runs']}, steps {counts['steps']}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.remove()


class CacheHandle(Handle):
    """A cache at work on a transformer, or on both of a pipeline with two."""

    def __init__(self, pipe_or_transformer: object, config: CacheConfig):
        """Find the blocks. Nothing is hooked until `attach`. Raises what `apply` says."""
        super().__init__()
        self._engines: list[Engine] = []
        self._found = []
        for transformer in transformers_of(pipe_or_transformer):
            if hasattr(transformer, "_orig_mod") or is_compiled(transformer):
                raise TypeError(
                    "h2cache.apply got a transformer that was compiled as a whole, which would compile the cache's "
                    "decisions away: pass the plain transformer and compile its blocks with "
                    "transformer.compile_repeated_blocks()"
                )
            adapter = adapter_of(transformer, pipe_or_transformer)
            refuse_other_caches(transformer)
            refuse_hooked_caches(transformer)
            self._found.append((transformer, adapter, lay_out(config, adapter, transformer)))

    def attach(self) -> None:
        """Hook the blocks."""
        self._engines = [Engine(*found, self._trace) for found in self._found]

    @property
    def config(self) -> CacheConfig:
        """The settings in force."""
        return self._engines[0].layout.config

    def update(self, **changes: Any) -> None:
        """Change settings from the next call of the model on.

        A run in progress keeps what it remembers as long as that still serves (thresholds, limits); otherwise it
        computes its next step.

        Raises:
            ValueError: for an unknown field or a value out of range; nothing is changed.
            RuntimeError: if the cache was removed or replaced.
        """
        if not all(engine.attached for engine in self._engines):
            raise RuntimeError("this cache was removed or replaced by another: call h2cache.apply again")
        config = self.config.updated(**changes)
        layouts = [lay_out(config, engine.adapter, engine.transformer) for engine in self._engines]
        for engine, layout in zip(self._engines, layouts, strict=True):
            engine.use(layout)

    def reset(self) -> None:
        """Forget every run in progress, so that the next call begins a new one."""
        for engine in self._engines:
            engine.runs.clear()

    def held_bytes(self) -> int:
        """Bytes that the cache holds at this moment; zero once the denoising loop is over.

        What the config's docstring says, and for Flux in each branch the rotary table of the positions,
        2 x (N+M, head_dim) in float32, which is made once a run: 5 MB at FLUX.1-dev, 1024x1024.
        """
        return sum(engine.runs.held_bytes() for engine in self._engines)

    def remove(self) -> None:
        """Leave the transformer as it was before `apply`. The trace stays readable. Idempotent.

        Where another `h2cache.apply` has replaced this cache, there is nothing left to remove; a warning says so, and
        the newer cache stays.
        """
        for engine in self._engines:
            engine.detach()
        if any(engine.replaced for engine in self._engines):
            logger.warning(
                "handle.remove(): this cache was already replaced by a later h2cache.apply, which stays: remove it by "
                "the handle that this later call returned"
            )


def apply(pipe_or_transformer: object, config: CacheConfig) -> Handle:
    """Cache a diffusion transformer's blocks by the method that `config` describes, or let a pipeline follow a plan.

    Pipelines that share the transformer share the method, each with its own runs. A plan is the pipeline's alone.
    Applying again replaces the method before. A loop whose timesteps rise, as in inversion, begins a run with every
    call of a cached transformer: exact, but never a hit.

    Args:
        pipe_or_transformer: a diffusers pipeline with one or two supported transformers, or a transformer itself; for a
            plan, a pipeline of any model whose scheduler a plan can follow.
        config: a method's configuration, such as `H2CacheConfig()`.

    Returns:
        The handle of the method, with its trace.

    Raises:
        TypeError: for an unsupported pipeline, transformer, scheduler or configuration.
        ValueError: for a method that this transformer cannot have.
        RuntimeError: where another library's cache is on the transformer.
    """
    if not isinstance(config, CacheConfig):
        raise TypeError(f"h2cache.apply got {config!r} as config: pass a method's config, such as H2CacheConfig()")
    # What cannot be had is refused before anything changes.
    handle = config.handle_for(pipe_or_transformer) or CacheHandle(pipe_or_transformer, config)
    _replace_earlier(pipe_or_transformer)
    handle.attach()
    return handle


def _replace_earlier(pipe_or_transformer: object) -> None:
    """Take off what an earlier `apply` put on this pipeline and on its transformers."""
    for transformer in transformers_of(pipe_or_transformer):
        earlier = interception_of(transformer) if isinstance(transformer, nn.Module) else None
        if earlier is not None:
            earlier.owner.detach(replaced=True)
    plan: Any = getattr(getattr(pipe_or_transformer, "scheduler", None), "watcher", None)
    if getattr(plan, "pipe", None) is pipe_or_transformer:
        plan.replace()
