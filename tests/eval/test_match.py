"""Experiments whose settings are tuned to the same speedup before they are drawn."""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from composing import composed_method
from hydra import compose, initialize_config_dir
from measured import results, row
from repository import REPOSITORY
from rich.console import Console

from h2cache.baselines import BlockCacheConfig, TaylorSeerConfig
from h2cache.eval import __main__ as program
from h2cache.eval.errors import UserError
from h2cache.eval.experiments import match
from h2cache.eval.experiments.match import matched
from h2cache.eval.experiments.study import Study, read_study
from h2cache.eval.generation import launchers
from h2cache.eval.generation.sweep import Failure
from h2cache.eval.report.results import Tuning
from h2cache.eval.report.tables import MatchedTable

PROMPTS = "".join(json.dumps({"id": f"p{i}", "prompt": f"a sign, number {i}"}) + "\n" for i in range(5))
STEPS = 12
BASELINE, BLOCK_CACHE = "Baseline: {method: none}", "Block Cache: {method: block_cache}"
TAYLORSEER = "TaylorSeer: {method: taylorseer, granularity: stage}"


@pytest.fixture
def arguments(tiny_pipe_folder, tmp_path) -> list[str]:
    """Of `python -m eval`: experiment `matched` on the tiny pipeline and five prompts, equal in blocks computed."""
    return arguments_in(tmp_path, tiny_pipe_folder)


@pytest.fixture(scope="module")
def tunings(tiny_pipe_folder, tmp_path_factory) -> tuple[Path, dict[str, Tuning]]:
    """What one search with `arguments` kept, and found."""
    folder = tmp_path_factory.mktemp("tuned")
    answer = found(arguments_in(folder, tiny_pipe_folder))
    return folder / "results/tunings", answer


@pytest.fixture
def tuned(arguments, tunings, tmp_path, monkeypatch) -> dict[str, Tuning]:
    """What was found with `arguments`, which are not to be tuned again."""
    kept, answer = tunings
    shutil.copytree(kept, tmp_path / "results/tunings")
    monkeypatch.setattr(launchers, "Painter", lambda *given: pytest.fail("tuned again"))
    return answer


def arguments_in(folder: Path, pipeline: Path) -> list[str]:
    (folder / "prompts.jsonl").write_text(PROMPTS)
    return [
        f"model.path={pipeline}",
        *("model.height=32", "model.width=32", f"model.num_inference_steps={STEPS}", "model.max_sequence_length=24"),
        *(
            "prompts=jsonl",
            f"prompts.path={folder / 'prompts.jsonl'}",
            f"out={folder / 'results'}",
            "launcher.workers=1",
        ),
        *("experiment=[matched]", "experiments.matched.metrics=[psnr]"),
        *instead("match", "{speedup: 2.0, prompts: 2, measured: blocks}"),
        *instead("settings", f"{{{BASELINE}, {TAYLORSEER}, {BLOCK_CACHE}}}"),
    ]


def instead(field: str, value: str) -> list[str]:
    """Overrides that put a mapping in the place of the experiment's, rather than into it."""
    return [f"~experiments.matched.{field}", f"+experiments.matched.{field}={value}"]


def study(arguments: list[str]) -> Study:
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        return read_study(compose("eval", overrides=arguments), "flux-mini", partial(composed_method, "flux-mini"))


def found(arguments: list[str], model: str = "a model") -> dict[str, Tuning]:
    read = study(arguments)
    read.out.mkdir(exist_ok=True)
    (experiment,) = matched(read, {"weights": model}, Console(file=StringIO())).experiments
    return {setting.name: setting.tuning for setting in experiment.settings if setting.tuning}


def test_equal_work_on_prompts_that_had_no_part_in_the_tuning(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval", *arguments])
    with pytest.raises(SystemExit) as exit:
        program.main()
    assert not exit.value.code, capsys.readouterr()
    frame = pd.read_csv(tmp_path / "results/matched/measurements.csv")
    assert set(frame["prompt_id"]) == {"p0", "p1", "p2"} and set(frame["seed"]) == {0, 1, 2}
    computed = frame.groupby("setting")["computed_fraction"].mean()
    assert computed["TaylorSeer"] == 0.5  # 3 + 9 // 3 of 12 steps
    assert computed["Block Cache"] == pytest.approx(0.5, abs=0.1)
    table = (tmp_path / "results/matched/matched.md").read_text()
    assert "interval = 3" in table and "on 2 prompts that are not in this table" in table


def test_nothing_is_tuned_twice_and_what_was_cut_short_is_tuned_again(arguments, tuned, tmp_path, monkeypatch):
    assert found(arguments) == tuned and set(tuned) == {"TaylorSeer", "Block Cache"}
    for kept in (tmp_path / "results/tunings").iterdir():
        kept.write_bytes(kept.read_bytes()[:-20])
    with pytest.raises(pytest.fail.Exception, match="tuned again"):
        found(arguments)
    monkeypatch.undo()
    assert found(arguments) == tuned


@pytest.mark.parametrize(
    "change",
    [
        "experiments.matched.match.speedup=1.5",
        "experiments.matched.match.prompts=1",
        "+experiments.matched.match.apart={TaylorSeer: 3}",
        "+experiments.matched.settings.TaylorSeer.order=0",
        "model.num_inference_steps=11",
    ],
)
def test_what_an_answer_depends_on_is_tuned_anew(arguments, tuned, change):
    with pytest.raises(pytest.fail.Exception, match="tuned again"):
        found([*arguments, change])


def test_another_model_or_machine_is_tuned_anew(arguments, tuned, monkeypatch):
    with pytest.raises(pytest.fail.Exception, match="tuned again"):
        found(arguments, model="another")
    monkeypatch.setattr(launchers, "machine_name", lambda model: "another")
    with pytest.raises(pytest.fail.Exception, match="tuned again"):
        found(arguments)


def test_a_method_that_does_not_reach_the_speedup_is_a_row_that_says_so(arguments, tmp_path, monkeypatch, capsys):
    """3 of 12 steps are computed at least: four times fewer blocks is all there is."""
    settings = instead("settings", f"{{{BASELINE}, {TAYLORSEER}}}")
    command = [*arguments[: -len(settings)], *settings, "+experiments.matched.match.apart={TaylorSeer: 5}"]
    monkeypatch.setattr(sys, "argv", ["eval", *command])
    with pytest.raises(SystemExit) as exit:
        program.main()
    assert not exit.value.code, capsys.readouterr()
    table = (tmp_path / "results/matched/matched.md").read_text()
    (line,) = (line for line in table.splitlines() if line.startswith("| TaylorSeer"))
    assert line.startswith("| TaylorSeer | does not reach it | 5.00x | 4.00x | – |")


SOLVERS = instead("settings", f"{{{BASELINE}, Euler: {{method: none, scheduler: euler}}}}")


@pytest.mark.parametrize(
    ("speedup", "steps", "reached"), [(2, 6, True), (3, 3, True), (4, 2, True), (6.5, 1, True), (8, 1, False)]
)
def test_a_solver_gets_the_number_of_steps_that_is_nearest(arguments, monkeypatch, speedup, steps, reached):
    """A call takes one second for each step and one besides: 13 / 2 is the most that 12 steps can be sped up."""
    seconds = lambda self, pipe, setting, steps, index: 1 + steps  # noqa: E731
    monkeypatch.setattr(match._OfSteps, "_seconds", seconds)
    asked = instead("match", f"{{speedup: {speedup}, prompts: 2}}")
    (tuning,) = found([*arguments, *SOLVERS, *asked]).values()
    assert (tuning.fields, tuning.reached) == ({"steps": steps}, reached)
    assert tuning.speedup == pytest.approx((1 + STEPS) / (1 + steps))


def test_the_steps_of_a_solver_are_measured(arguments):
    (tuning,) = found([*arguments, *SOLVERS, *instead("match", "{speedup: 2, prompts: 2}")]).values()
    assert 1 <= tuning.fields["steps"] < STEPS and tuning.speedup > 1


@pytest.mark.thorough
@pytest.mark.skipif(not find_spec("ray"), reason="launcher=ray is an optional extra")
def test_workers_of_ray_find_what_one_process_finds_and_know_it_the_next_time(arguments, tunings, tmp_path):
    """Two searches, each whole on one of two workers; what is known needs no model."""
    on_ray = [*(each for each in arguments if each != "launcher.workers=1"), "launcher=ray", "launcher.workers=2"]
    kept, answer = tunings
    assert found(on_ray) == answer
    assert {file.name for file in (tmp_path / "results/tunings").iterdir()} == {file.name for file in kept.iterdir()}
    assert found([*on_ray, f"model.path={tmp_path / 'absent'}"]) == answer


def test_a_search_whose_workers_die_is_one_sentence_and_what_was_found_before_is_kept(arguments, tmp_path):
    class Deadly(launchers.LocalLauncher):
        """Makes the first search alone."""

        def search(self, model, searches, show, on_machine):
            yield from super().search(model, searches[:1], show, on_machine)
            yield searches[1], Failure("its worker died, 3 times", "")

    read = replace(study(arguments), launcher=Deadly())
    read.out.mkdir()
    with pytest.raises(UserError, match="match: Block Cache cannot be tuned: its worker died, 3 times"):
        matched(read, {}, Console(file=StringIO()))
    assert len(list((tmp_path / "results/tunings").iterdir())) == 1


def test_a_search_can_be_sent_to_another_process(arguments):
    for asked in (arguments, [*arguments, *SOLVERS, *instead("match", "{speedup: 2, prompts: 2}")]):
        for search in match._searches(study(asked)).values():
            sent = pickle.loads(pickle.dumps(search))
            assert type(sent) is type(search) and sent.identity() == search.identity()


def test_workers_on_machines_of_two_kinds_are_refused(arguments, monkeypatch):
    class Two(launchers.LocalLauncher):
        """A cluster whose first answer comes from another machine than its first worker."""

        def machine(self, model):
            return "an A100"

    read = study(arguments)
    with pytest.raises(UserError, match="another is an A100: speedups of different machines"):
        matched(replace(read, launcher=Two()), {}, Console(file=StringIO()))


def test_settings_with_nothing_to_turn_stay(arguments):
    """The baseline, and fewer steps of its own scheduler."""
    read = study([*arguments, *instead("settings", f"{{{BASELINE}, Fewer: {{method: none, steps: 3}}}}")])
    assert matched(read, {}, Console(file=StringIO())).experiments[0].settings == read.experiments[0].settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (instead("match", "{speedup: 2}"), "give speedup and prompts"),
        (instead("match", "{speedup: 0, prompts: 2}"), "finite number above 0"),
        (instead("match", "{speedup: 2, prompts: 0}"), "prompts=0"),
        (instead("match", "{speedup: 2, prompts: 2, measured: steps}"), "time or blocks"),
        (instead("match", "{speedup: 2, prompts: 2, apart: {HiCache: 3}}"), "HiCache"),
        (instead("match", "{speedup: 2, prompts: 5}"), "leaves none of 5 prompts"),
        (SOLVERS, "needs measured: time"),
    ],
)
def test_what_cannot_be_matched_is_one_sentence(arguments, change, words):
    with pytest.raises(UserError, match=words):
        found([*arguments, *change])


def test_a_setting_is_drawn_as_it_was_found(arguments, tuned):
    after = matched(study(arguments), {"weights": "a model"}, Console(file=StringIO()))
    drawn = {row.setting.name: row.cell.method for row in after.rows[0]}
    assert drawn["TaylorSeer"] == TaylorSeerConfig(3, granularity="stage")
    (block,) = (setting for setting in after.experiments[0].settings if setting.name == "Block Cache")
    assert drawn["Block Cache"] == replace(BlockCacheConfig(), **block.tuning.fields)


def test_the_table_says_what_was_asked_found_and_measured(tmp_path):
    rows = [
        row(tmp_path, "Baseline", "Baseline", "a", "a sign", 2.0),
        row(tmp_path, "TeaCache", "TeaCache", "a", "a sign", 0.5),
        row(tmp_path, "Plan", "Plan", "a", "a sign", 0.5),
    ]
    tunings = {"TeaCache": Tuning(4.99, "time", {"threshold": 0.123456}, 4.912, True, 3)}
    MatchedTable(metrics=()).make(results(rows, tunings=tunings), tmp_path)
    cells = {
        line.split(" | ")[0]: line.split(" | ")[1:5] for line in (tmp_path / "matched.md").read_text().splitlines()
    }
    assert cells["| TeaCache"] == ["threshold = 0.1235", "4.99x", "4.91x", "1.00 (2.50x)"]
    assert cells["| Plan"][:3] == ["as written", "–", "–"] and cells["| Baseline"][:3] == ["–", "–", "–"]
    data = pd.read_csv(tmp_path / "matched.csv").set_index("setting")
    assert data.loc["TeaCache", "asked"] == "4.99x" and data.loc["Plan", "found"] == "as written"
    assert Path(tmp_path / "matched.tex").is_file()
