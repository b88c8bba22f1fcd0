"""`python -m tools.choices`: the table of docs/choose.md is what docs/results has."""

from repository import REPOSITORY

from tools.choices import MARKS, tables
from tools.coverage_matrix import inserted


def test_the_page_has_what_the_results_have():
    page = (REPOSITORY / "docs/choose.md").read_text(encoding="utf-8")
    assert inserted(page, tables(), MARKS) == page, "python -m tools.choices --write docs/choose.md"


def test_a_table_is_of_one_experiment(tmp_path, monkeypatch):
    header = "setting,prompts,evaluations_mean,denoising_seconds_speedup,psnr_mean,psnr@converged_mean\n"
    for experiment, prompts in (("a", 80), ("b", 24)):
        (tmp_path / experiment).mkdir()
        rows = [f'"{name}",{prompts},12.04,1.25,n/a,40.04\n' for name in ("One, x = 1", "Two")]
        (tmp_path / experiment / "summary.csv").write_text(header + "".join(rows))
    monkeypatch.setattr("tools.choices.RESULTS", tmp_path)
    monkeypatch.setattr("tools.choices.ROWS", {"a": ["Two"], "b": ["One, x = 1"]})
    lines = [line for line in tables().splitlines() if line and not line.startswith(("| setting", "|---"))]
    assert lines == [
        "Experiment `a`, 80 prompts:",
        "| Two | 12.0 | 1.25 | – | 40.0 |",
        "Experiment `b`, 24 prompts:",
        "| One, x = 1 | 12.0 | 1.25 | – | 40.0 |",
    ]
