"""What is drawn: prompts from a JSONL file or a Hugging Face dataset, checked before the first image is made."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets

from h2cache.eval.errors import UserError
from h2cache.eval.files import REPOSITORY, find_file


@dataclass(frozen=True)
class Picture:
    """A picture in a file, with the SHA-256 of the file's bytes; named as in `Record`."""

    image: Path
    image_sha256: str

    @classmethod
    def of(cls, file: Path) -> "Picture":
        """OSError if the file cannot be read."""
        return cls(file, hashlib.sha256(file.read_bytes()).hexdigest())


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its set says besides.

    Fields:
        id: its name in tables and files.
        text: what the pipeline is asked for.
        word: that the image should show.
        picture: what the pipeline is given beside the text, where it takes one.
        truth: what a perfect result shows.
    """

    id: str
    text: str
    word: str | None = None
    picture: Picture | None = None
    truth: Picture | None = None


class PromptSet(Protocol):
    """Where prompts come from; configs/prompts/*.yaml."""

    def load(self) -> tuple[Prompt, ...]:
        """All prompts, in order, with ids that differ. UserError says what is wrong where."""


@dataclass(frozen=True)
class PromptFile:
    """A JSONL file, one object a line: `prompt`, with `id` and `word` if wanted, or the schema of the paper's captions.

    That schema has `file_path` (the id) and `image_caption` (the prompt, or a list that holds it). `picture` and
    `truth` are files, seen from the JSONL file's folder. Other keys are left alone. `path` is seen from where you are
    or from this repository.
    """

    path: str

    def load(self) -> tuple[Prompt, ...]:
        file = self._find()
        return _collect(((f"{file}, line {number}", row) for number, row in _lines(file)), file.parent)

    def _find(self) -> Path:
        file = find_file(str(self.path))
        if file is None:
            raise UserError(f"prompts.path={self.path}: no such file, seen from {Path.cwd()} or from {REPOSITORY}")
        return file


@dataclass(frozen=True)
class HubPrompts:
    """A dataset of the Hugging Face hub, or a folder that holds one.

    `column` has the prompts, `id_column` and `word_column` (None: there is none) the rest; without `id_column` the ids
    are row numbers. `name` is the dataset's configuration, where it has several.
    """

    dataset: str
    column: str
    split: str = "train"
    name: str | None = None
    id_column: str | None = None
    word_column: str | None = None

    def load(self) -> tuple[Prompt, ...]:
        rows = self._fetch()
        wanted = {"prompt": self.column, "id": self.id_column, "word": self.word_column}
        wanted = {key: column for key, column in wanted.items() if column is not None}
        for column in wanted.values():
            if column not in rows.column_names:
                there = ", ".join(rows.column_names)
                raise UserError(f"prompts.dataset={self.dataset} has no column {column}; choose from {there}")
        rows = rows.select_columns(list(dict.fromkeys(wanted.values())))  # pictures beside them stay undecoded
        named = ({key: row[column] for key, column in wanted.items()} for row in rows)
        return _collect(((f"{self.dataset}, row {number}", row) for number, row in enumerate(named)), Path())

    def _fetch(self) -> datasets.Dataset:
        try:
            return datasets.load_dataset(self.dataset, self.name, split=self.split)
        except Exception as error:  # what a hub, a network or a dataset's files can raise is nobody's closed list
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"cannot load prompts.dataset={self.dataset}, split {self.split} ({reason}): check the name, "
                "prompts.split, prompts.name and the network"
            ) from error


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, what its JSON says). Blank lines at the end are none."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    for number, line in enumerate(content.rstrip().split(b"\n"), start=1):
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            what = f"not JSON ({error.msg} at character {error.pos + 1})" if line.strip() else "empty"
            raise UserError(f"{file}, line {number}: {what}; every line is one JSON object") from error


def _collect(rows: Iterable[tuple[str, Any]], folder: Path) -> tuple[Prompt, ...]:
    """The prompts of (place, row) pairs, as one table; UserError names the place of what is wrong.

    Pictures are seen from `folder`.
    """
    table, places = [], {}
    for index, (place, row) in enumerate(rows):
        prompt = _prompt(place, row, index, folder)
        if prompt.id in places:
            raise UserError(f"{place}: the id {prompt.id!r} is that of {places[prompt.id]} too; ids must differ")
        places[prompt.id] = place
        table.append(prompt)
    if not table:
        raise UserError("the prompt set is empty; choose another with prompts=")
    return tuple(table)


def _prompt(place: str, row: Any, index: int, folder: Path) -> Prompt:
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: {type(row).__name__} instead of an object with prompt or image_caption")
    key = "prompt" if "prompt" in row else "image_caption"
    if key not in row:
        raise UserError(f"{place}: neither prompt nor image_caption; there is {', '.join(row) or 'nothing'}")
    text = row[key]
    if isinstance(text, list):
        if len(text) != 1:
            raise UserError(f"{place}: {key} is a list of {len(text)}; it must be one string, or a list that holds one")
        (text,) = text
    name = row.get("id", row.get("file_path"))
    name = str(index) if name is None else str(name) if isinstance(name, int) else name
    word = row.get("word")
    for field, value in ((key, text), ("id", name), *([("word", word)] if word is not None else [])):
        _check_text(place, field, value)
    return Prompt(name, text, word, *(_picture(place, row, field, folder) for field in ("picture", "truth")))


def _picture(place: str, row: Mapping[str, Any], field: str, folder: Path) -> Picture | None:
    if field not in row:
        return None
    _check_text(place, field, row[field])
    try:
        return Picture.of(folder / row[field])
    except OSError as error:
        raise UserError(f"{place}: {field}={row[field]}: {error.strerror}, seen from {folder}") from error


def _check_text(place: str, field: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {field} is {value!r}; it must be a string that is not blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {field} holds half of a surrogate pair at character {error.start + 1}") from error
