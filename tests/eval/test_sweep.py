"""The sweep: every image once, whatever happens on the way. Real pipelines, real kills."""

import errno
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from diary import CELLS, METHODS, STEPS, Diary, timeless
from PIL import Image
from rich.console import Console

import h2cache
from h2cache.baselines import BlockCacheConfig, TeaCacheConfig
from h2cache.eval.cli.progress import watching
from h2cache.eval.errors import UserError
from h2cache.eval.generation import sweep as sweeping
from h2cache.eval.generation.backends import diffusers_cache
from h2cache.eval.generation.generate import generate
from h2cache.eval.generation.launchers import LocalLauncher
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.generation.records import Cell, Store
from h2cache.eval.generation.sweep import Failure, Painter, Report, sweep
from h2cache.eval.models.identity import identity
from h2cache.eval.models.pipelines import ModelConfig


@pytest.fixture(scope="module")
def model(tiny_pipe_folder: Path) -> ModelConfig:
    fields = {"path": str(tiny_pipe_folder), "hub_id": None, "dtype": "float32", "device": "cpu", "offload": "none"}
    sizes = {"height": 32, "width": 32, "num_inference_steps": 9, "guidance_scale": 3.5, "max_sequence_length": 24}
    return ModelConfig(**fields, **sizes)


@pytest.fixture
def draw(model, tmp_path):
    """`draw()` sweeps CELLS (or others) into a folder of this test and returns the report."""

    def draw(cells: Sequence[Cell] = CELLS, folder: str = "records", watcher: Diary | None = None) -> Report:
        store = Store(tmp_path / folder, identity(model))
        with store.locked():
            return sweep(store, cells, model, LocalLauncher(), watcher or Diary())

    return draw


def test_each_image_is_the_librarys_with_its_trace_and_times(draw, tiny_pipe):
    report = draw()
    assert (report.drawn, report.failures, len(report.records)) == (6, {}, 6)
    call = {"height": 32, "width": 32, "num_inference_steps": STEPS, "guidance_scale": 3.5, "max_sequence_length": 24}
    for cell, record in zip(CELLS, report.records.values(), strict=True):
        expected, fraction = partial(generate, tiny_pipe, cell.prompt.text, cell.seed, **call), 1.0
        if cell.method is None:
            image = expected().image
        else:
            with h2cache.apply(tiny_pipe, cell.method) as handle:
                image, fraction = expected().image, handle.summary()["computed_fraction"]
            assert record.trace.read_bytes().decode() == handle.trace.to_pandas().to_csv(index=False)
        assert np.array_equal(Image.open(record.image), image)
        assert record.computed_fraction == fraction
        assert min(record.text_seconds, record.denoising_seconds, record.vae_seconds) > 0
        assert record.peak_memory_bytes is None


def test_prompt_by_prompt_the_settings_take_turns_and_someone_may_watch(draw):
    diary = Diary()
    draw(watcher=diary)
    turns = [cell for cell in diary.events if isinstance(cell, Cell)]
    assert turns == CELLS
    image = [*((step, STEPS) for step in range(1, STEPS + 1)), "drawn"]
    assert diary.events == [[3, 3], *(event for cell in CELLS for event in [cell, *image])]


def test_nothing_is_drawn_twice(draw, monkeypatch):
    """Not in one run, where experiments share cells, and not in the next, which does not even load the model."""
    renamed = [Cell(Prompt("c", cell.prompt.text), cell.seed, cell.steps, cell.method) for cell in CELLS]
    first = draw([*CELLS, *CELLS, *renamed])
    assert first.drawn == 6
    monkeypatch.setattr(sweeping, "load_pipeline", lambda *given: pytest.fail("the model was loaded"))
    second = draw()
    assert (second.drawn, second.records) == (0, first.records)


def test_what_is_missing_is_added_and_the_rest_stays(draw):
    first = draw(CELLS[:4])
    second = draw()
    assert second.drawn == 2
    assert {name: second.records[name] for name in first.records} == first.records


def test_the_first_drawing_with_a_setting_is_kept_as_cold_and_done_again(model, monkeypatch):
    calls, taken = [], []

    def spy(pipe, prompt, seed, on_step, **arguments):
        calls.append(arguments["num_inference_steps"])
        drawing = generate(pipe, prompt, seed, on_step, **arguments)
        taken.append(drawing.denoising_seconds)
        return drawing

    monkeypatch.setattr(sweeping, "generate", spy)
    painter = Painter(model)
    drawn = [painter.draw(Cell(cell.prompt, cell.seed, 10, cell.method)) for cell in CELLS]
    assert calls == [10] * 9
    assert [each.cold_seconds for each in drawn] == [*taken[:6:2], None, None, None]
    assert [each.denoising_seconds for each in drawn] == [*taken[1:6:2], *taken[6:]]


def test_on_a_cpu_a_methods_numbers_and_the_batch_need_no_drawing_before(model):
    """A GPU chooses kernels by sizes; a CPU has nothing to ready but the code."""
    painter, cell = Painter(model), CELLS[0]
    first, *others = (
        replace(cell, method=BlockCacheConfig(threshold=0.1)),
        replace(cell, method=BlockCacheConfig(threshold=0.2)),
        replace(cell, method=BlockCacheConfig(threshold=0.1), call=(("num_images_per_prompt", 2),)),
    )
    anew = (
        replace(first, method=TeaCacheConfig()),
        replace(first, method=None),
        replace(first, scheduler="unipc"),
        replace(first, method=diffusers_cache("FirstBlockCacheConfig", threshold=0.1)),
        replace(first, method=diffusers_cache("TaylorSeerCacheConfig", cache_interval=3)),
    )
    assert painter.draw(first).cold_seconds and [painter.draw(each).cold_seconds for each in others] == [None, None]
    assert all(painter.draw(each).cold_seconds for each in anew)
    painter._device = torch.device("cuda")
    assert len({painter._readied_by(each) for each in (first, *others, *anew)}) == 8


def fail_with(error: Exception, method: object, monkeypatch) -> None:
    """Let everything with `method` raise `error`, until `monkeypatch.undo`."""
    apply = h2cache.apply

    def failing(pipe, config):
        if config == method:
            raise error
        return apply(pipe, config)

    monkeypatch.setattr(h2cache, "apply", failing)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room for this"), RuntimeError("a bug")])
def test_a_method_that_fails_is_noted_the_others_go_on_and_it_is_tried_again(draw, tmp_path, monkeypatch, error):
    undisturbed = draw(folder="undisturbed").records
    fail_with(error, METHODS[1], monkeypatch)
    report = draw()
    assert [(cell, failure.reason) for cell, failure in report.failures.values()] == [
        (CELLS[1], f"{type(error).__name__}: {error}"),
        (CELLS[4], f"{type(error).__name__}: {error}"),
    ]
    assert len(list((tmp_path / "records").glob("*.failed.json"))) == 2
    assert report.drawn == 4
    monkeypatch.undo()
    again = draw()
    assert (again.drawn, again.failures) == (2, {})
    assert timeless(again.records) == timeless(undisturbed)
    assert list((tmp_path / "records").glob("*.failed.json")) == []


def test_a_full_disk_ends_the_run_with_one_sentence_and_loses_nothing(draw, tmp_path, monkeypatch):
    """After the third image there is no room, not even for the first bytes of the fourth."""
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if len(list((tmp_path / "records").glob("*.json"))) == 3:
            write(path, content[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full: make room and run the same command again"):
        draw()
    monkeypatch.undo()
    assert draw().drawn == 3
    assert timeless(draw().records) == timeless(draw(folder="undisturbed").records)


def test_ctrl_c_ends_the_run_and_the_next_goes_on(draw, monkeypatch):
    class Impatient(Diary):
        def ends(self, cell: Cell, reason: str | None) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(watcher=Impatient())
    assert draw().drawn == 5


def in_a_process_killed_at(event: int, work: partial) -> bool:
    """Do `work` in a process that gets SIGKILL at its `event`-th file operation on records; True if it got so far.

    The process is a fork of this one, which has the pipeline loaded.
    """
    child = os.fork()
    if child == 0:
        left = Counter({"events": event})

        def hook(name: str, arguments: tuple) -> None:
            if name in ("open", "os.rename", "os.remove", "os.mkdir") and "records" in str(arguments[0]):
                left["events"] -= 1
                if left["events"] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_killed_at_any_point_the_next_run_ends_as_if_undisturbed(draw, tmp_path):
    """SIGKILL at every file operation there is: opening, renaming and removing."""
    undisturbed = timeless(draw(CELLS[:2], "undisturbed").records)
    kills = 0
    while in_a_process_killed_at(kills + 1, partial(draw, CELLS[:2], f"records{kills}")):
        assert timeless(draw(CELLS[:2], f"records{kills}").records) == undisturbed
        on_disk = draw(CELLS[:2], f"records{kills}")
        assert (on_disk.drawn, timeless(on_disk.records)) == (0, undisturbed)
        hidden = [path.name for path in (tmp_path / f"records{kills}").iterdir() if path.name.startswith(".")]
        assert hidden == [".lock"]  # and no half-written file
        kills += 1
    assert kills > 2 * 5  # an image is two or three files, opened and renamed


def test_killed_again_and_again_it_gets_on(draw, tmp_path):
    """A run that never survives its 24th file operation ends after a few attempts, each with an image more."""
    undisturbed = timeless(draw(folder="undisturbed").records)
    drawn, attempts = set(), 0
    while in_a_process_killed_at(24, partial(draw, CELLS, "records")):
        attempts += 1
        now = {path.stem for path in (tmp_path / "records").glob("[!.]*.json")}
        assert now > drawn
        drawn = now
    assert attempts > 1
    assert timeless(draw(CELLS, "records").records) == undisturbed


def test_times_of_two_machines_are_not_mixed(draw, monkeypatch):
    draw(CELLS[:2])
    monkeypatch.setattr(sweeping, "machine_name", lambda model: "another")
    with pytest.raises(UserError, match=r"different machines are not comparable.*another out="):
        draw()
    assert draw(CELLS[:2]).drawn == 0  # tables can be made anywhere


def test_a_cluster_of_different_machines_is_refused(model, tmp_path):
    class Cluster:
        def draw(self, model, batches, watcher, on_machine):
            on_machine("one")
            on_machine("one")
            on_machine("another")
            yield

    with pytest.raises(UserError, match="drawn on one, and this is another"):
        sweep(Store(tmp_path, identity(model)), CELLS, model, Cluster(), Diary())


def test_a_model_that_does_not_fit_is_one_sentence(draw, monkeypatch):
    def too_large(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sweeping, "load_pipeline", too_large)
    with pytest.raises(UserError, match=r"does not fit into the GPU's memory: use model.offload"):
        draw()


def terminal(interactive: bool) -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, force_terminal=interactive, width=100, color_system=None), text


def watch(console: Console, clock: Iterator[float], monkeypatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    names = {cell.way: name for cell, name in zip(CELLS, ("Baseline", "H2-Cache", "TaylorSeer"), strict=False)}
    with watching(console, names) as watcher:
        watcher.has([tuple(CELLS[:3]), tuple(CELLS[3:])])
        watcher.loads(0, 24_000_000)
        watcher.loads(24_000_000, 24_000_000)
        for cell in CELLS:
            watcher.begins(cell)
            for step in range(STEPS):
                watcher.steps(step + 1, STEPS)
            watcher.ends(cell, None)


def test_a_log_gets_a_line_a_minute(monkeypatch):
    console, text = terminal(interactive=False)
    watch(console, iter(range(0, 10**6, 40)), monkeypatch)
    assert text.getvalue().splitlines() == [
        "6 images to draw, 2 prompts",
        "2 of 6 images, about 3 minutes left",
        "4 of 6 images, about 1 minutes left",
        "6 of 6 images, about 0 minutes left",
    ]


def test_a_terminal_gets_bars_for_images_prompts_settings_and_steps(monkeypatch):
    console, text = terminal(interactive=True)
    watch(console, iter(range(10**6)), monkeypatch)
    shown = text.getvalue()
    assert all(word in shown for word in ("images", "6/6", "prompts", "2/2", "TaylorSeer", "2/3", "steps", "4/4"))


def test_a_failure_keeps_what_was_raised_for_the_note(model, monkeypatch):
    fail_with(ValueError("in two\nlines"), METHODS[1], monkeypatch)
    failure = Painter(model).draw(CELLS[1])
    assert isinstance(failure, Failure)
    assert failure.reason == "ValueError: in two lines"
    assert "Traceback" in failure.details
