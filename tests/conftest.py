"""What the tests share: an offline machine and the models that they run on. Helpers to import are in `support/`."""

import os

# Before anything imports a hub client: no test may depend on a network, or find out that there is one.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
# Before anything imports torch: one thread in every Python thread, where `torch.set_num_threads` reaches only its own.
# The models are tiny, so that more cost time, and sums that are split differently round differently.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import copy
import gc
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from repository import REPOSITORY

# torch and diffusers are imported where they are needed: the process that hands out the tests runs none, and the others
# wait for it before they start.
if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=20, print_blob=False)
settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Importing makes a million objects and hardly any garbage; looking for it took a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """One thread. And what has been imported lives as long as the process: the garbage collector need not see it.

    It looks after 50,000 new objects, not after 700: with 700 it takes a twentieth of the time. Tests of what is freed
    collect by themselves.
    """
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_pipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline on disk, for tests that load their own."""
    from tiny import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def _shared_tiny_pipe(tiny_pipe_folder: Path) -> "FluxPipeline":
    return _load(tiny_pipe_folder)


@pytest.fixture
def tiny_pipe(_shared_tiny_pipe: "FluxPipeline"):
    """A FluxPipeline of random weights, shared by the session: leave it as you found it."""
    from attachments import take_off

    yield _shared_tiny_pipe
    take_off(_shared_tiny_pipe.transformer)


@pytest.fixture
def own_pipe(tiny_pipe) -> "FluxPipeline":
    """A pipeline with a transformer to spoil."""
    from pictures import own_pipeline

    return own_pipeline(tiny_pipe, transformer=copy.deepcopy(tiny_pipe.transformer))


@pytest.fixture
def transformer() -> "FluxTransformer2DModel":
    """The tiny transformer, fresh for every test: 2 double and 3 single blocks."""
    from tiny import tiny_transformer

    return tiny_transformer(double=2, single=3, seed=0, guidance=True)


@pytest.fixture
def timesteps_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine sees timesteps as on an accelerator; the model gets the plain ones."""
    from waits import hide_timesteps

    hide_timesteps(monkeypatch)


@pytest.fixture(scope="session")
def _shared_flux_mini() -> "FluxPipeline":
    return _load(REPOSITORY / "assets" / "flux-mini")


@pytest.fixture
def flux_mini(_shared_flux_mini: "FluxPipeline"):
    """The embedded, trained model, loaded once a session: leave it as you found it."""
    from attachments import take_off

    yield _shared_flux_mini
    take_off(_shared_flux_mini.transformer)


def _load(folder: Path) -> "FluxPipeline":
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def chromium():
    """Chromium as the machine has it; playwright's own download is not needed."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no chromium, chromium-browser or google-chrome on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    arguments = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=found, headless=True, args=arguments.split())
        yield browser
        browser.close()
