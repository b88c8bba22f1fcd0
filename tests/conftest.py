"""What the tests share: an offline machine, the methods under test, and the models that they run on."""

import os

# Before anything imports a hub client: no test may depend on a network, or find out that there is one.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
# Before anything imports torch: one thread in every Python thread, where `torch.set_num_threads` reaches only its own.
# The models are tiny, so that more cost time, and sums that are split differently round differently.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from hypothesis import settings
from tiny import save_tiny_pipeline, tiny_transformer

from baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache import CacheConfig, Decision, H2CacheConfig, Plan, PlanConfig
from h2cache.conditions import Conditions
from h2cache.interception import interception_of
from h2cache.memory import SampleMemory

REPOSITORY = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=20, print_blob=False)
settings.load_profile("repeatable")

# Of twelve steps it computes five. Pipelines with other numbers of steps follow it resampled; a loop of one's own, of
# which the length is not known, computes what comes after it.
PLAN = Plan(
    Conditions(steps=12),
    computed=(0, 1, 2, 5, 8),
    weights={
        3: (1.8, -0.8),
        4: (2.4, -1.6, 0.2),
        6: (1.3, -0.4, 0.1),
        7: (1.6, -0.6),
        9: (1.3, -0.3),
        10: (1.7, -0.8, 0.1),
        11: (1.9, -0.9),
    },
)

# Every method, with settings that sometimes hit and sometimes miss on the tiny models and on flux-mini.
METHODS = [
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35), id="h2-reuse"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, pool1=4, pool2=6), id="h2-pooled"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, forecast="taylor", warmup_steps=2), id="h2-taylor"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, forecast="hermite", order=2), id="h2-hermite"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, hierarchical=False), id="h2-flat"),
    pytest.param(TeaCacheConfig(threshold=0.4, coefficients=(1.0, 0.0)), id="teacache"),
    pytest.param(TaylorSeerConfig(interval=3), id="taylorseer"),
    pytest.param(TaylorSeerConfig(interval=4, order=2, granularity="stage"), id="taylorseer-stage"),
    pytest.param(HiCacheConfig(interval=3, order=2), id="hicache"),
    pytest.param(HiCacheConfig(interval=3, granularity="stage", sigma="auto"), id="hicache-auto-stage"),
    pytest.param(ClusCaConfig(interval=3, clusters=3), id="clusca"),
    pytest.param(PlanConfig(PLAN, allow_transfer=True), id="plan"),
    pytest.param(BlockCacheConfig(threshold=0.3), id="block-cache"),
]


def kind(config: CacheConfig) -> tuple:
    """What a composition is made of, apart from numbers: those of one kind take the same way through the engine."""
    return tuple(
        (
            (stage.groups, type(stage.probe), stage.parent is None, stage.fits),
            (stage.modules, stage.clusters is None, stage.output),
        )
        for stage in config.compose()
    )


def measures(config: CacheConfig) -> bool:
    """Whether images are looked at, so that each is decided about by itself. Else a schedule decides for all alike."""
    return any(stage.probe is not None for stage in config.compose())


def runs_first_block(config: CacheConfig) -> bool:
    """Whether the first block of every stage runs at each step; else no block runs where a stage is skipped."""
    return all(stage.runs_first_block for stage in config.compose())


def skips_modules(config: CacheConfig) -> bool:
    """Whether blocks run throughout, and the attention and MLP modules inside them are skipped."""
    return any(stage.modules for stage in config.compose())


def has_clusters(config: CacheConfig) -> bool:
    """Whether a few fresh tokens correct what is forecast in the steps that are skipped."""
    return any(stage.clusters is not None for stage in config.compose())


def skips_model(config: CacheConfig) -> bool:
    """Whether what is skipped are calls of the model: then nothing of it runs, not even what lies around the blocks."""
    return any(stage.output for stage in config.compose())


def warmup_steps(config: CacheConfig) -> int:
    """The first steps of a run that compute because they are the first."""
    rule = config.compose()[0].rule
    return next(step for step in count() if rule.without_measuring(SampleMemory(), step, False) is not Decision.WARMUP)


def methods(predicate: Callable[[CacheConfig], bool]) -> list:
    return [method for method in METHODS if predicate(method.values[0])]


MEASURING = methods(measures)
SCHEDULED = methods(lambda config: not measures(config))
FIRST_BLOCK = methods(runs_first_block)
EARLY = methods(lambda config: measures(config) and not runs_first_block(config))  # measures before any block runs
MODULES = methods(skips_modules)
# One method of each kind, where a test has more to vary than the method.
KINDS = list({kind(method.values[0]): method for method in reversed(METHODS)}.values())[::-1]


def every_method_once(name: str, values: dict[str, Any], most: str) -> pytest.MarkDecorator:
    """(config, `name`): one method of each kind with all `values`, and the other methods with the one called `most`."""
    cases = [(method, key) for method in METHODS for key in values if method in KINDS or key == most]
    return pytest.mark.parametrize(
        ("config", name),
        [pytest.param(method.values[0], values[key], id=f"{method.id}-{key}") for method, key in cases],
    )


def never_hitting(config: CacheConfig) -> CacheConfig:
    """The same method with thresholds that nothing is below, or computing one step in one, or a plan of all steps."""
    every_step = Plan(Conditions(steps=100), tuple(range(100)), {})  # more than any run has, or resampling adds skips
    return _set(config, tau1=-1.0, tau2=-1.0, threshold=-1.0, interval=1, plan=every_step)


def always_hitting(config: CacheConfig) -> CacheConfig:
    """The same method with thresholds that all is below, or no end to its forecasts, and with no step as the last."""
    first_step = Plan(Conditions(steps=100), (0,), {step: (1.0,) for step in range(1, 100)})
    values = dict(tau1=math.inf, tau2=math.inf, threshold=math.inf, interval=10**9, num_steps=10**9, plan=first_step)
    return _set(config, **values)


def _set(config: CacheConfig, **values: Any) -> CacheConfig:
    """Those fields that the method has."""
    return config.updated(**{name: value for name, value in values.items() if hasattr(config, name)})


def take_off(transformer: torch.nn.Module) -> None:
    """Remove whatever method a failed test may have left on a shared model."""
    worn = interception_of(transformer)
    if worn is not None:
        worn.owner.detach()


@pytest.fixture(scope="session")
def tiny_pipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline on disk, for tests that load their own."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def _shared_tiny_pipe(tiny_pipe_folder: Path) -> FluxPipeline:
    return _load(tiny_pipe_folder)


@pytest.fixture
def tiny_pipe(_shared_tiny_pipe: FluxPipeline):
    """A FluxPipeline of random weights, shared by the session: leave it as you found it."""
    yield _shared_tiny_pipe
    take_off(_shared_tiny_pipe.transformer)


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    """The tiny transformer, fresh for every test: 2 double and 3 single blocks."""
    return tiny_transformer(double=2, single=3, seed=0, guidance=True)


@pytest.fixture(scope="session")
def _shared_flux_mini() -> FluxPipeline:
    return _load(REPOSITORY / "assets" / "flux-mini")


@pytest.fixture
def flux_mini(_shared_flux_mini: FluxPipeline):
    """The embedded, trained model, loaded once a session: leave it as you found it."""
    yield _shared_flux_mini
    take_off(_shared_flux_mini.transformer)


def _load(folder: Path) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
