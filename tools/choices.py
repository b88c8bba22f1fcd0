"""The measured tables of docs/choose.md, from docs/results: `python -m tools.choices --write docs/choose.md`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from h2cache.eval.files import REPOSITORY
from tools.coverage_matrix import inserted

MARKS = "<!-- tools.choices: begin -->", "<!-- tools.choices: end -->"
RESULTS = REPOSITORY / "docs" / "results"
ROWS: Mapping[str, Sequence[str]] = {  # experiment: settings
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
    "solvers": [
        "Baseline",
        "UniPC, steps = 12",
        "UniPC, steps = 20",
        "HiCache, interval = 4",
        "HiCache on UniPC, interval = 2, steps = 20",
        "H2-Cache on UniPC, steps = 20",
        "Plan, plan = flux-mini-4",
    ],
}
COLUMNS = {
    "evaluations": ("evaluations_mean", ".1f"),
    "denoising speedup": ("denoising_seconds_speedup", ".2f"),
    "PSNR to the uncached image, dB": ("psnr_mean", ".1f"),
    "PSNR to the converged solution, dB": ("psnr@converged_mean", ".1f"),
}


def tables() -> str:
    """In Markdown, a table of each experiment: all rows of one table are over the same prompts."""
    return "\n\n".join(f"{title}\n\n{table}" for title, table in map(_table, ROWS))


def _table(experiment: str) -> tuple[str, str]:
    measured = pd.read_csv(RESULTS / experiment / "summary.csv", na_values="n/a").set_index("setting")
    lines = [f"| setting | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {name} | {' | '.join(_cells(measured.loc[name]))} |" for name in ROWS[experiment]]
    return f"Experiment `{experiment}`, {measured['prompts'].max()} prompts:", "\n".join(lines)


def _cells(row: pd.Series) -> list[str]:
    return ["–" if pd.isna(row[column]) else f"{row[column]:{form}}" for column, form in COLUMNS.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into a page")
    page = parser.parse_args().write
    if page is None:
        print(tables())
    else:
        page.write_text(inserted(page.read_text(encoding="utf-8"), tables(), MARKS), encoding="utf-8")


if __name__ == "__main__":
    main()
