"""A table as text, and the forms it is written in."""

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from h2cache.eval.files import atomic_files
from h2cache.eval.report.results import Artifact

MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$])")
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    **{character: "\\" + character for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Sheet:
    """What a table shows: rows of cells; `notes` are sentences under it, and `reasons` those on metrics that are n/a.

    The page has one list of all such reasons, so that they are in the table's files but not in its caption.
    Columns are right-aligned but for those of `words`, the first unless more are given.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    words: tuple[int, ...] = (0,)
    reasons: tuple[str, ...] = ()

    def _aligned(self, left: str, right: str) -> list[str]:
        """One of the two for each column."""
        return [left if number in self.words else right for number in range(len(self.header))]

    def to_markdown(self) -> str:
        """Names are data: markup in them stays text."""
        lines = [self.header, self._aligned("---", "---:")]
        lines = [" | ".join(map(_markdown, lines[0])), "|".join(lines[1])]
        lines += [" | ".join(map(_markdown, row)) for row in self.rows]
        lines = [f"| {lines[0]} |", f"|{lines[1]}|", *(f"| {line} |" for line in lines[2:])]
        notes = "\n".join(f"- {_markdown(note)}" for note in (*self.notes, *self.reasons))
        return "\n".join([f"### {_markdown(self.title)}", "", *lines, "", notes, ""])

    def to_latex(self, label: str) -> str:
        """A `table` for a document with \\usepackage{booktabs} and \\usepackage[T1]{fontenc}."""
        rows = [" & ".join(map(_latex, row)) + r" \\" for row in self.rows]
        caption = " ".join([self.title.rstrip(".") + ".", *self.notes, *self.reasons])
        # Several columns of words would be wider than a page: their lines break.
        text = "l" if len(self.words) == 1 else rf"p{{{1 / len(self.header):.2f}\textwidth}}"
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(caption)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{{''.join(self._aligned(text, 'r'))}}}",
            r"\toprule",
            " & ".join(map(_latex, self.header)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def to_rich(self) -> Table:
        """For the terminal."""
        table = Table(title=Text(self.title), box=box.SIMPLE_HEAD, title_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if number in self.words else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def write(self, data: pd.DataFrame, folder: Path, name: str, experiment: str) -> Artifact:
        """`name`.md, .csv (`data`, at full precision) and .tex in `folder`, all of them or none."""
        folder.mkdir(parents=True, exist_ok=True)
        files = tuple(folder / f"{name}{suffix}" for suffix in (".md", ".csv", ".tex"))
        with atomic_files(files) as (markdown, csv, latex):
            markdown.write_text(self.to_markdown(), encoding="utf-8")
            data.to_csv(csv, index=False, na_rep="n/a")
            latex.write_text(self.to_latex(f"{experiment}:{name}"), encoding="utf-8")
        return Artifact(name, self.title, " ".join(self.notes), files, self)


def _markdown(text: str) -> str:
    return MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;").replace("\\<", "&lt;")


def _latex(text: str) -> str:
    return "".join(LATEX_SPECIAL.get(character, character) for character in " ".join(text.split()))
