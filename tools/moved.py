"""What moved: the numbers of files beside those that git's HEAD has, times aside.

A number is known by where it stands: the keys above it in JSON and YAML, row and column of a table, else the words
around it. CSV and LaTeX are left out: they have the numbers of the Markdown beside them.
"""

import io
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from h2cache.eval.errors import UserError
from tools.keep_results import cells

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w|\.\d)")  # not 2.97x, which is a speedup
# What is a time, follows from one (`matched` tunes to a measured speedup), or is a fact about the machine.
TIMED = re.compile(
    r"\btimes?\b|speedup|\bs: |, s$|\bhours\b|\bfound\b|\btuning\b|throughput|at_equal_time|harness_overhead|threads"
)
NOT_TYPED = re.compile(r"^(```.*?^```|<!-- table .*?<!-- /table -->|    .*?|#.*?)$", re.MULTILINE | re.DOTALL)
SENTENCE = re.compile(r"^\|[^\n]*|\S.*?(?:[.!?](?=\s)|(?=\n\s*(?:\n|- |\||\d\. ))|\Z)", re.MULTILINE | re.DOTALL)
MEASURED = re.compile(r"\d ?(?:dB|%)|\d(?:\.\d+)?x\b|\d times|\d evaluations")
PARTS = 8  # a picture is compared by the mean brightness of so many parts a side

Named = Iterator[tuple[str, float]]


class Change(NamedTuple):
    """A file's numbers beside those of HEAD.

    Fields:
        moved: how many of the `count` that both have differ.
        other: how many only one of them has.
        furthest: the one that differs most for its size, with its values; empty if none does.
    """

    file: str
    moved: int
    count: int
    other: int
    furthest: str
    was: float
    now: float


def report(root: Path, patterns: Sequence[str], pages: Sequence[Path]) -> str:
    """What differs from HEAD, as a table; empty if nothing does.

    If a number moved, the sentences and rows of `pages` with a typed one follow: whether they hold, people must read.

    Args:
        root: of the repository.
        patterns: of the files to compare.
        pages: Markdown that people write and whose tables a command fills; compared as well.

    Raises:
        UserError: if `root` is not in git.
    """
    asked = [*(f":(glob){pattern}" for pattern in patterns), *(page.relative_to(root).as_posix() for page in pages)]
    listed = _git(root, "diff", "--name-only", "--relative", "-z", "HEAD", "--", *asked)
    listed += _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *asked)
    changed = listed.decode().split("\0")[:-1]
    if not changed:
        return ""
    changes = [compared(root, file) for file in changed if Path(file).suffix in READERS]
    text = f"{len(changed)} files differ from git's HEAD. Their numbers, times aside:\n{_table(changes)}"
    if any(change.moved or change.other for change in changes):
        text += "Typed by hand; read whether they still hold:\n"
        for page in pages:
            for line, sentence in measured(page.read_text(encoding="utf-8")):
                text += f"{page.relative_to(root)}:{line}: {sentence}\n"
    return text


def compared(root: Path, file: str) -> Change:
    """A file that only HEAD has, or only `root`, has no numbers in the other."""
    content = _git(root, "show", f"HEAD:./{file}") if _git(root, "ls-tree", "HEAD", "--", file) else None
    before = numbers(file, content)
    after = numbers(file, (root / file).read_bytes() if (root / file).exists() else None)
    both = before.keys() & after.keys()
    far = {n: abs(after[n] - before[n]) / max(abs(after[n]), abs(before[n])) for n in both if after[n] != before[n]}
    furthest = max(sorted(far), key=far.__getitem__, default="")
    values = before.get(furthest, 0.0), after.get(furthest, 0.0)
    return Change(file, len(far), len(both), len(before.keys() ^ after.keys()), furthest, *values)


def numbers(file: str, content: bytes | None) -> dict[str, float]:
    """The numbers of a file by name, times aside; a second one of the same name gets its count."""
    found, seen = {}, Counter()
    for name, value in READERS[Path(file).suffix](content) if content is not None else ():
        if not TIMED.search(f"{file}: {name}"):
            seen[name] += 1
            found[f"{name} ({seen[name]})" if seen[name] > 1 else name] = value
    return found


def _of_markdown(content: bytes) -> Named:
    header: list[str] = []
    for line in content.decode().splitlines():
        header = (header or cells(line)) if line.startswith("|") else []
        row = cells(line) if header else [line]
        names = [f"{row[0]}: {column}" for column in header] or [NUMBER.sub("…", line).strip()]
        for name, text in list(zip(names, row, strict=False))[bool(header) :]:
            yield from ((name, float(number.replace(",", ""))) for number in NUMBER.findall(text))


def _leaves(value: Any, name: str = "") -> Named:
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def _of_picture(content: bytes) -> Named:
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.float64)
    yield from (("height", float(pixels.shape[0])), ("width", float(pixels.shape[1])))
    for row, band in enumerate(np.array_split(pixels, PARTS)):
        for column, part in enumerate(np.array_split(band, PARTS, axis=1)):
            yield f"brightness of part {row}, {column} of {PARTS}x{PARTS}", float(part.mean())


READERS = {
    ".md": _of_markdown,
    ".json": lambda content: _leaves(json.loads(content)),
    ".yaml": lambda content: _leaves(yaml.safe_load(content)),
    ".png": _of_picture,
}


def measured(text: str) -> Iterator[tuple[int, str]]:
    """The sentences and rows of a page with a measured number, and their lines; without code and filled tables."""
    kept = NOT_TYPED.sub(lambda match: "\n" * match[0].count("\n"), text)
    for found in SENTENCE.finditer(kept):
        if MEASURED.search(found[0]):
            yield kept.count("\n", 0, found.start()) + 1, " ".join(found[0].split())


def _table(changes: Sequence[Change]) -> str:
    table = Table(box=None, pad_edge=False)
    for column in ("file", "moved", "in one alone", "furthest for its size", "HEAD", "now"):
        table.add_column(
            column, overflow="fold", justify="left" if column in ("file", "furthest for its size") else "right"
        )
    for file, moved, count, other, furthest, was, now in changes:
        values = (f"{was:g}", f"{now:g}") if moved else ("", "")
        table.add_row(file, f"{moved} of {count}", str(other), furthest, *values)
    console = Console(width=140, file=io.StringIO())
    console.print(table, markup=False)
    return console.file.getvalue()


def _git(root: Path, *words: str) -> bytes:
    try:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", b"").decode().strip() or error
        raise UserError(f"cannot compare with git's HEAD in {root}: {told}") from error
