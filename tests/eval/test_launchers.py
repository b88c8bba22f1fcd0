"""Two workers on the CPU, of Ray or of this process, draw what one process draws, also where one of them is killed."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from diary import CELLS, Deadly, Diary, timeless

from h2cache.eval.errors import UserError
from h2cache.eval.generation.launchers import LocalLauncher, RayLauncher
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.generation.records import Cell, Drawn, Store
from h2cache.eval.generation.sweep import Report, sweep
from h2cache.eval.models.identity import identity
from h2cache.eval.models.pipelines import ModelConfig

RAY = pytest.mark.skipif(not find_spec("ray"), reason="launcher=ray is an optional extra")

# Four prompts, so that each worker has some to do.
MANY = [Cell(Prompt(f"{cell.prompt.id}{k}", cell.prompt.text), k, 4, cell.method) for cell in CELLS for k in (1, 2)]


@pytest.fixture(scope="module")
def model(tiny_pipe_folder: Path) -> ModelConfig:
    fields = {"path": str(tiny_pipe_folder), "hub_id": None, "dtype": "float32", "device": "cpu", "offload": "none"}
    sizes = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": 24}
    return ModelConfig(**fields, **sizes)


@pytest.fixture
def draw(model, tmp_path):
    def draw(launcher: object, folder: str, watcher: Diary | None = None) -> Report:
        store = Store(tmp_path / folder, identity(model))
        with store.locked():
            return sweep(store, MANY, model, launcher, watcher or Diary())

    return draw


def workers() -> Iterator[int]:
    """The processes that draw and descend from this one."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (_command(folder).startswith(b"ray::Worker") or b"spawn_main" in _command(folder)):
            parent = int(folder.name)
            while parent > 1 and parent != os.getpid():
                parent = _parent(parent)
            if parent == os.getpid():
                yield int(folder.name)


def _command(folder: Path) -> bytes:
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Killer(Diary):
    """Kills the workers as soon as the first image is there: one of them drew it, another may still load."""

    killed: tuple[int, ...] = ()

    def ends(self, cell: Cell, reason: str | None) -> None:
        super().ends(cell, reason)
        if not self.killed:
            self.killed = tuple(workers())
            for pid in self.killed:
                os.kill(pid, signal.SIGKILL)


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("launcher", [LocalLauncher(workers=2), pytest.param(RayLauncher(workers=2), marks=RAY)])
def test_killed_workers_are_replaced_and_the_records_are_those_of_one_process(draw, launcher):
    killer = Killer()
    report = draw(launcher, "two", killer)
    assert len(killer.killed) == 2
    assert (report.drawn, report.failures) == (len(MANY), {})
    assert killer.events[1:] == ["drawn"] * len(MANY)
    assert timeless(report.records) == timeless(draw(LocalLauncher(), "one").records)
    assert list(workers()) == []


@pytest.mark.thorough
def test_a_model_that_cannot_be_loaded_is_one_sentence_of_the_workers_too(model, tmp_path):
    absent = replace(model, path=str(tmp_path / "absent"))
    batches = [(cell,) for cell in MANY[:2]]
    with pytest.raises(UserError, match="absent"):
        list(LocalLauncher(workers=2).draw(absent, batches, Diary(), lambda machine: None))


@pytest.mark.thorough
def test_an_image_that_workers_die_of_is_given_up_and_the_others_are_drawn(model):
    deadly = replace(MANY[0], method=Deadly())
    cells = [deadly, *MANY[1:3]]
    outcomes = dict(LocalLauncher(workers=2).draw(model, [tuple(cells), (MANY[3],)], Diary(), lambda machine: None))
    assert outcomes.pop(deadly).reason == "its worker died, 3 times"
    assert {cell: type(drawn) for cell, drawn in outcomes.items()} == dict.fromkeys(MANY[1:4], Drawn)


def test_without_ray_it_says_how_to_get_it(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"launcher=ray needs Ray: pip install 'ray>=2.40', or use launcher=local"):
        draw(RayLauncher(), "ray")


def test_what_cannot_be_had_is_one_sentence(model):
    for fields in ({"workers": 0}, {"workers": True}, {"cpus_per_worker": 0}):
        with pytest.raises(UserError, match="whole number from 1"):
            RayLauncher(**fields)
    with pytest.raises(UserError, match="whole number from 1"):
        LocalLauncher(workers=0)
    launcher = RayLauncher(workers=3, cpus_per_worker=2)
    with pytest.raises(UserError, match="Ray has 5 CPUs and 0 GPUs, too few for 3 workers with 2 CPUs each"):
        launcher._size({"CPU": 5.0}, model)


@pytest.mark.parametrize(
    ("device", "resources", "workers", "size"),
    [
        ("auto", {"CPU": 16, "GPU": 4}, None, (4, 1)),  # one pipeline for each GPU
        ("auto", {"CPU": 3, "GPU": 4}, None, (3, 1)),
        ("cuda", {"CPU": 16, "GPU": 4}, 2, (2, 1)),
        ("cpu", {"CPU": 16, "GPU": 4}, None, (16, 0)),
        ("auto", {"CPU": 16}, None, (16, 0)),
    ],
)
def test_how_many_workers_there_are(model, device, resources, workers, size):
    assert RayLauncher(workers=workers)._size(resources, replace(model, device=device)) == size
