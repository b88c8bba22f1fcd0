"""Keeps what a run of the experiments made: `python -m tools.keep_results results/flux-mini`.

Tables and figures go to docs/results, without the images, the records and the page. In README.md and docs/*.md a table
between two comments is made anew from the one that it names, with the columns and rows that it asks for (all, if none):

    <!-- table table1/summary; columns: setting | evaluations; rows: Baseline | UniPC -->
    <!-- /table -->
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from omegaconf import OmegaConf

from h2cache.eval.files import CONFIGS, REPOSITORY, atomic_files

KEPT = (".md", ".csv", ".tex", ".png")
PUBLISHED = "published"
RESULTS = REPOSITORY / "docs/results"
PLACE = re.compile(r"(<!-- table ([\w./-]+)(.*?) -->\n).*?(<!-- /table -->)", re.DOTALL)


def keep(run: Path, target: Path = RESULTS) -> list[Path]:
    """Copy the tables and figures of `run` in the place of those of earlier runs; returns the experiments' folders.

    A run that lacks experiments which are kept, of those that a run without `experiment=` does, replaces its own alone,
    and not what is said of all together: the claims of the papers and environment.json. Runs of another model than
    configs/eval.yaml names are kept in a folder of their own, docs/results/MODEL, without the claims.
    """
    if not (run / "environment.json").is_file():
        raise SystemExit(f"keep_results: {run} holds no finished run: python -m eval out={run} ends it")
    facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    listed = OmegaConf.to_container(OmegaConf.load(CONFIGS / "eval.yaml").defaults)
    usual = {name: option for each in listed if isinstance(each, dict) for name, option in each.items()}
    is_usual = facts["model"] == usual["model"]
    target = target if is_usual else target / facts["model"]
    folders = sorted(file.parent for file in run.glob("*/measurements.csv"))
    known = {file.name for file in target.glob("*/")} & set(usual["experiment"])
    whole = known <= {folder.name for folder in folders}
    if whole and is_usual and (run / PUBLISHED).is_dir():
        folders.append(run / PUBLISHED)
    for folder in folders:
        shutil.rmtree(target / folder.name, ignore_errors=True)
        (target / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir()):
            if file.suffix in KEPT and file.name != "measurements.csv":
                shutil.copy(file, target / folder.name)
    if not whole:
        return folders
    facts["overrides"] = [each for each in facts["overrides"] if not each.startswith("out=")]
    facts["command"] = " ".join(word for word in facts["command"].split() if not word.startswith("out="))
    (target / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return folders


def fill(text: str, results: Path = RESULTS) -> str:
    """`text` with every table in it made anew. ValueError for a row or column that is not there."""

    def table(match: re.Match) -> str:
        opening, name, asked, closing = match.groups()
        lines = (results / f"{name}.md").read_text(encoding="utf-8").splitlines()
        header, align, *rows = [cells(line) for line in lines if line.startswith("|")]
        columns = [_index(header, column, name) for column in _asked(asked, "columns") or header]
        known = [row[0] for row in rows]
        chosen = [rows[_index(known, row, name)] for row in _asked(asked, "rows") or known]
        kept = [[row[column] for column in columns] for row in (header, align, *chosen)]
        return opening + "".join(f"| {' | '.join(row)} |\n" for row in kept) + closing

    return PLACE.sub(table, text)


def cells(line: str) -> list[str]:
    """Of a row of a Markdown table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _asked(text: str, name: str) -> list[str]:
    found = re.search(rf"{name}: ([^;]*)", text)
    return [each.strip() for each in re.split(r" *\| *", found[1])] if found else []


def _index(names: list[str], name: str, table: str) -> int:
    if name not in names:
        raise ValueError(f"{table} has no {name!r}, but {', '.join(names)}")
    return names.index(name)


def pages() -> list[Path]:
    """Whose tables are made anew."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder that run_exper.sh wrote")
    folders = keep(parser.parse_args().run)
    for page in pages():
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            with atomic_files([page]) as (file,):
                file.write_text(filled, encoding="utf-8")
    print(f"kept: {', '.join(str(folder.relative_to(folder.parent.parent)) for folder in folders)}")


if __name__ == "__main__":
    main()
