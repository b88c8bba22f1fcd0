"""`apply` and the handle that it returns."""

from types import TracebackType
from typing import Any, Self

from .adapters import find_adapter
from .config import CacheConfig
from .engine import Engine
from .interception import interception_of
from .trace import Trace


class Handle:
    """A method at work on a transformer: its record, its settings, its end. Also a context manager."""

    def __init__(self, engine: Engine):
        self._engine = engine

    @property
    def config(self) -> CacheConfig:
        """The settings in force."""
        return self._engine.method.config

    @property
    def trace(self) -> Trace:
        """Every decision of the last runs."""
        return self._engine.trace

    def summary(self) -> dict[str, Any]:
        """What the trace adds up to; see `Trace.summary`."""
        return self._engine.trace.summary()

    def update(self, **changes: Any) -> None:
        """Change settings from the next call of the denoiser on.

        A run in progress keeps what it remembers as long as that still serves (thresholds, limits); otherwise it
        computes its next step. ValueError names an unknown field or a value out of range, and changes nothing;
        RuntimeError if the cache was removed or replaced.
        """
        if not self._engine.attached:
            raise RuntimeError("this cache was removed or replaced by another: call h2cache.apply again")
        self._engine.use(self.config.updated(**changes))

    def reset(self) -> None:
        """Forget every run in progress, so that the next call begins a new one.

        Pipelines never need it. A loop of your own does if it hands the same `img_ids` object to more than one run.
        """
        self._engine.runs.clear()

    def held_bytes(self) -> int:
        """Bytes that the cache holds at this moment: zero once the denoising loop has let go of its `img_ids`.

        What the config's docstring says, and for each branch the rotary table of the positions, 2 x (N+M, head_dim) in
        float32, which is made once a run: 5 MB at FLUX.1-dev, 1024x1024.
        """
        return self._engine.runs.held_bytes()

    def remove(self) -> None:
        """Leave the transformer as it was before `apply`. The trace stays readable. Idempotent."""
        self._engine.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.remove()


def apply(pipe_or_transformer: object, config: CacheConfig) -> Handle:
    """Cache a diffusion transformer's blocks by the method that `config` describes.

    Takes any diffusers pipeline with a supported transformer, or the transformer itself. Pipelines that share the
    transformer share the method, each with its own runs. Applying again replaces the method before. A loop whose
    timesteps rise, as in inversion, begins a run with every call: exact, but never a hit.

    TypeError for an unsupported pipeline, transformer or configuration; ValueError for a method that this transformer
    cannot have.
    """
    if not isinstance(config, CacheConfig):
        raise TypeError(f"h2cache.apply got {config!r} as config: pass a method's config, such as H2CacheConfig()")
    transformer, adapter = find_adapter(pipe_or_transformer)
    adapter.check(config.compose())  # what cannot be had is refused before anything changes
    worn = interception_of(transformer)
    if worn is not None:
        worn.owner.detach()
    return Handle(Engine(transformer, adapter, config))
