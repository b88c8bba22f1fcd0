"""`python -m tools.choices`: the table of docs/choose.md is what docs/results has."""

from repository import REPOSITORY

from tools.choices import MARKS, table
from tools.coverage_matrix import inserted


def test_the_page_has_what_the_results_have():
    page = (REPOSITORY / "docs/choose.md").read_text(encoding="utf-8")
    assert inserted(page, table(), MARKS) == page, "python -m tools.choices --write docs/choose.md"


def test_a_row_is_the_first_setting_of_its_method(tmp_path, monkeypatch):
    measured = "setting,evaluations_mean,denoising_seconds_speedup,psnr_mean,psnr@converged_mean\n"
    for experiment, methods in {"a": ["One, x = 1", "One, x = 2", "One more"], "b": ["Two"]}.items():
        (tmp_path / experiment).mkdir()
        rows = [f'"{name}",{index},1.25,n/a,40.04\n' for index, name in enumerate(methods)]
        (tmp_path / experiment / "summary.csv").write_text(measured + "".join(rows))
    monkeypatch.setattr("tools.choices.RESULTS", tmp_path)
    monkeypatch.setattr("tools.choices.ROWS", {"a": ["One more", "One"], "b": ["Two"]})
    assert table().splitlines()[2:] == [
        "| One more | 2.0 | 1.25 | – | 40.0 |",
        "| One, x = 1 | 0.0 | 1.25 | – | 40.0 |",
        "| Two | 0.0 | 1.25 | – | 40.0 |",
    ]
