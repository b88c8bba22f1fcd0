"""report.html: every experiment's tables, figures and images in one file that needs nothing else, not even a network.

Whatever comes from outside (prompts, names, machines) is text: the template escapes it, the data for the script is JSON
whose markup is escaped, the script writes text only, and by the page's content policy no other script runs and nothing
is loaded.
"""

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from PIL import Image

from h2cache.eval.errors import UserError
from h2cache.eval.files import atomic_files
from h2cache.eval.report.comparison import comparisons
from h2cache.eval.report.figures.style import COLUMN, DPI
from h2cache.eval.report.results import Artifact, Results
from h2cache.eval.report.webtable import WebTable, web_table

TEMPLATES = Path(__file__).with_name("templates")
SCRIPTS = ("report.js", "ballot.js", "films.js")  # one after the other
IMAGE_BUDGET = 8_000_000  # bytes of compressed images to compare; a page three quarters of which is theirs still mails
WHOLE_FIGURE = 600_000  # bytes up to which a figure is on the page as it is on disk
FIGURE_WIDTH = 1600  # pixels of larger ones
FACTS = ("model", "machine", "time", "commit", "command")  # of the environment, in the header; the rest stands below


@dataclass(frozen=True)
class WebFigure:
    """A figure as the page shows it."""

    name: str
    title: str
    caption: str
    source: str  # a data URI
    width: int
    height: int
    compressed: bool
    links: tuple[tuple[str, str], ...]

    @property
    def is_wide(self) -> bool:
        """Whether it is made for more than one column of a journal."""
        return self.width > COLUMN * DPI + 1


def write(
    results: Sequence[tuple[Results, Sequence[Artifact]]],
    environment: Mapping[str, Any],
    target: Path,
    image_budget: int = IMAGE_BUDGET,
    published: Artifact | None = None,
) -> None:
    """Write the page to `target`, whole or not at all; links to the artifacts' files are relative to it.

    `environment` may nest: `title` and FACTS go to the header (model, machine and command by default those of the first
    results), all else into a table at the end. Images to compare are compressed, as many prompts of each experiment as
    fit into `image_budget` bytes, and the page says so. `published` is a table in a section of its own. UserError if
    there is nothing to show.
    """
    if not results:
        raise UserError(f"cannot write {target}: there are no results; run an experiment first")
    page = _page(results, environment, target.parent, image_budget, published)
    with atomic_files([target]) as (temporary,):
        temporary.write_text(page, encoding="utf-8")


def _page(
    results: Sequence[tuple[Results, Sequence[Artifact]]],
    environment: Mapping[str, Any],
    folder: Path,
    budget: int,
    published: Artifact | None,
) -> str:
    compared, images = comparisons([each for each, _ in results], budget)
    experiments = [
        {
            "results": each,
            "tables": [table for artifact in artifacts if (table := _table(artifact, folder))],
            "figures": [figure for artifact in artifacts if (figure := _figure(artifact, folder))],
            "comparison": comparison,
        }
        for (each, artifacts), comparison in zip(results, compared, strict=True)
    ]
    style, script = _asset("report.css"), "".join(map(_asset, SCRIPTS))
    first = results[0][0]
    facts = {"model": first.model, "machine": first.machine, "command": first.command} | dict(environment)
    loader = jinja2.FileSystemLoader(TEMPLATES)
    surroundings = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return surroundings.get_template("report.html").render(
        title=str(environment.get("title", "H2-Cache: results")),
        facts=[(name, _readable(facts[name])) for name in FACTS if facts.get(name)],
        environment=list(_flat({key: value for key, value in environment.items() if key not in (*FACTS, "title")})),
        experiments=experiments,
        published=published and _table(published, folder),
        data={"images": images, "comparisons": [each and each.data for each in compared]},
        style=Markup(style),  # ours, as the script is
        script=Markup(script),
        policy=(
            f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
    )


def _readable(value: Any) -> str:
    """A point in time as 2026-01-31 12:00 UTC, all else as it is."""
    try:
        return datetime.fromisoformat(str(value)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(value)


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of every leaf that is there; names of nested ones are joined by a full stop."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], ()):
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(artifact: Artifact, folder: Path) -> tuple[Artifact, WebTable, tuple] | None:
    """The artifact as a table, with links to its files; None for a figure."""
    return (artifact, web_table(artifact.table), _links(artifact, folder)) if artifact.table else None


def _figure(artifact: Artifact, folder: Path) -> WebFigure | None:
    pictures = [path for path in artifact.files if path.suffix == ".png"]
    if not pictures:
        return None
    written = pictures[0].read_bytes()
    with Image.open(BytesIO(written)) as image:
        width, height = image.size
        compressed = len(written) > WHOLE_FIGURE
        kind, shown = ("webp", _compressed(image)) if compressed else ("png", written)
    return WebFigure(
        artifact.name,
        artifact.title,
        artifact.caption,
        f"data:image/{kind};base64,{base64.b64encode(shown).decode()}",
        width,
        height,
        compressed,
        _links(artifact, folder),
    )


def _compressed(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    if image.width > FIGURE_WIDTH:
        height = round(image.height * FIGURE_WIDTH / image.width)
        image = image.resize((FIGURE_WIDTH, height), Image.Resampling.LANCZOS)
    file = BytesIO()
    image.save(file, "webp", quality=90)
    return file.getvalue()


def _links(artifact: Artifact, folder: Path) -> tuple[tuple[str, str], ...]:
    """(kind, address relative to the page) of each file."""
    return tuple(
        (path.suffix.removeprefix(".").upper(), quote(Path(os.path.relpath(path, folder)).as_posix()))
        for path in artifact.files
    )
