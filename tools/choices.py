"""The measured table of docs/choose.md, from docs/results: `python -m tools.choices --write docs/choose.md`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from h2cache.eval.files import REPOSITORY
from tools.coverage_matrix import inserted

MARKS = "<!-- tools.choices: begin -->", "<!-- tools.choices: end -->"
RESULTS = REPOSITORY / "docs" / "results"
ROWS: Mapping[str, Sequence[str]] = {  # experiment: settings, each by the beginning of its name
    "table1": [
        "Baseline",
        "UniPC",
        "Block Cache",
        "TeaCache",
        "H2-Cache",
        "TaylorSeer",
        "HiCache",
        "Hi-ClusCa",
        "Plan",
    ],
    "solvers": ["HiCache on UniPC", "H2-Cache on UniPC"],
}
COLUMNS = {
    "evaluations": ("evaluations_mean", ".1f"),
    "denoising speedup": ("denoising_seconds_speedup", ".2f"),
    "PSNR to the uncached image, dB": ("psnr_mean", ".1f"),
    "PSNR to the converged solution, dB": ("psnr@converged_mean", ".1f"),
}


def table() -> str:
    """In Markdown: the first row of each method, as measured."""
    lines = [f"| setting | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for experiment, methods in ROWS.items():
        measured = pd.read_csv(RESULTS / experiment / "summary.csv", na_values="n/a").set_index("setting")
        for method in methods:
            name = next(name for name in measured.index if name.partition(",")[0] == method)
            lines.append(f"| {name} | {' | '.join(_cells(measured.loc[name]))} |")
    return "\n".join(lines)


def _cells(row: pd.Series) -> list[str]:
    return ["–" if pd.isna(row[column]) else f"{row[column]:{form}}" for column, form in COLUMNS.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page")
    page = parser.parse_args().write
    if page is None:
        print(table())
    else:
        page.write_text(inserted(page.read_text(encoding="utf-8"), table(), MARKS), encoding="utf-8")


if __name__ == "__main__":
    main()
