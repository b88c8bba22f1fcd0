"""What the tests share: an offline machine, the methods under test, and the models that they run on."""

import os

# Before anything imports a hub client: no test may depend on a network, or find out that there is one.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
# Before anything imports torch: one thread in every Python thread, where `torch.set_num_threads` reaches only its own.
# The models are tiny, so that more cost time, and sums that are split differently round differently.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from hypothesis import settings
from tiny import save_tiny_pipeline, tiny_transformer

import h2cache
from baselines import BlockCacheConfig
from h2cache import H2CacheConfig
from h2cache.interception import interception_of

REPOSITORY = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=20, print_blob=False)
settings.load_profile("repeatable")

# Every method, with settings that sometimes hit and sometimes miss on the tiny models and on flux-mini.
METHODS = [
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35), id="h2-reuse"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, pool1=4, pool2=6), id="h2-pooled"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, forecast="taylor", warmup_steps=2), id="h2-taylor"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, forecast="hermite", order=2), id="h2-hermite"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, hierarchical=False), id="h2-flat"),
    pytest.param(BlockCacheConfig(threshold=0.3), id="block-cache"),
]


def never_hitting(config: h2cache.CacheConfig) -> h2cache.CacheConfig:
    """The same method with thresholds that nothing is below."""
    if isinstance(config, H2CacheConfig):
        return config.updated(tau1=-1.0, tau2=-1.0)
    return config.updated(threshold=-1.0)


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
