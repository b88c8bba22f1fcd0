"""What a run made is kept without its images, and the tables of the docs are made anew from it."""

import json

import pytest
from repository import REPOSITORY

from tools.keep_results import fill, keep, pages

TABLE = "### T\n\n| setting | a, dB | b |\n|---|---:|---:|\n| Baseline | 1 | 2 |\n| H2\\|x | 3 | 4 |\n\n- note\n"

FACTS = {"command": "python -m eval out=/a/b limit=3", "model": "flux-mini", "overrides": ["out=/a/b", "limit=3"]}


@pytest.fixture
def kept(tmp_path):
    run = tmp_path / "run/table1"
    run.mkdir(parents=True)
    (run / "summary.md").write_text(TABLE)
    for name in ("summary.csv", "summary.pdf", "measurements.csv", "figure.png"):
        (run / name).touch()
    (tmp_path / "run/records").mkdir()
    (tmp_path / "run/records/a.png").touch()
    (tmp_path / "run/environment.json").write_text(json.dumps(FACTS))
    old = tmp_path / "kept/table1"
    old.mkdir(parents=True)
    (old / "gone.md").touch()
    keep(tmp_path / "run", tmp_path / "kept")
    return tmp_path / "kept"


def test_tables_and_figures_are_kept(kept):
    assert sorted(file.name for file in kept.rglob("*.*")) == [
        "environment.json",
        "figure.png",
        "summary.csv",
        "summary.md",
    ]
    assert json.loads((kept / "environment.json").read_text()) == {
        "command": "python -m eval limit=3",
        "model": "flux-mini",
        "overrides": ["limit=3"],
    }


def test_a_run_of_some_experiments_replaces_its_own_alone(kept, tmp_path):
    (tmp_path / "run/table1").rename(tmp_path / "run/frontier")
    (tmp_path / "run/published").mkdir()
    (tmp_path / "run/published/published.md").touch()
    (tmp_path / "run/environment.json").write_text(json.dumps({**FACTS, "command": "another"}))
    assert [folder.name for folder in keep(tmp_path / "run", kept)] == ["frontier"]
    assert (kept / "frontier/summary.md").is_file() and not (kept / "published").exists()
    assert json.loads((kept / "environment.json").read_text()) == {
        "command": "python -m eval limit=3",
        "model": "flux-mini",
        "overrides": ["limit=3"],
    }


def test_another_model_has_a_folder_of_its_own_without_the_claims(kept, tmp_path):
    (tmp_path / "run/published").mkdir()
    (tmp_path / "run/published/published.md").touch()
    (tmp_path / "run/environment.json").write_text(json.dumps({**FACTS, "model": "a-video-model"}))
    before = sorted(kept.glob("*"))
    keep(tmp_path / "run", kept)
    assert sorted(kept.glob("*")) == sorted([*before, kept / "a-video-model"])
    assert json.loads((kept / "environment.json").read_text())["model"] == "flux-mini"
    own = kept / "a-video-model"
    assert sorted(file.name for file in own.glob("*")) == ["environment.json", "table1"]
    opening = "<!-- table a-video-model/table1/summary; columns: b; rows: Baseline -->"
    assert "| 2 |" in fill(f"{opening}\n<!-- /table -->", kept)


def test_a_table_is_made_anew_with_the_columns_and_rows_asked_for(kept):
    opening = "<!-- table table1/summary; columns: b | setting; rows: Baseline -->"
    filled = fill(f"before\n{opening}\nold\n<!-- /table -->\nafter", kept)
    assert filled == f"before\n{opening}\n| b | setting |\n| ---: | --- |\n| 2 | Baseline |\n<!-- /table -->\nafter"
    assert fill(filled, kept) == filled
    everything = fill("<!-- table table1/summary -->\n<!-- /table -->", kept)
    assert everything.count("\n") == 5 and "| H2\\|x | 3 | 4 |" in everything


def test_what_is_not_there_is_named(kept):
    with pytest.raises(ValueError, match="table1/summary has no 'c', but setting, a, dB, b"):
        fill("<!-- table table1/summary; columns: c -->\n<!-- /table -->", kept)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_the_tables_of_the_docs_are_those_of_the_results_that_are_kept(page):
    text = page.read_text(encoding="utf-8")
    assert fill(text) == text
