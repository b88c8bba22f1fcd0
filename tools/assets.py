"""Makes anew what depends on the weights of the embedded models: `make assets`, which is `python -m tools.assets`.

configs/assets.yaml says what that is, in order, and by which commands. assets/made_from.json has for each entry the
digests of what it was made from: an entry whose weights, or whatever else it is made from, are no longer those is made
again. What is finished is noted at once, so the same command goes on where it was stopped. At the end it says which
numbers moved (tools/moved.py).
"""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from h2cache.eval.cli import arguments as commandline
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS, REPOSITORY, atomic_files, file_digest
from tools.keep_results import pages
from tools.moved import report

ALL = "all"
RECORD = "assets/made_from.json"

Digests = dict[str, str]  # of each pattern of an entry's inputs


@dataclass(frozen=True, eq=False)
class Entry:
    """Something that is made from weights; configs/assets.yaml explains the fields. Patterns are seen from the root."""

    name: str
    weights: Sequence[str]
    commands: Sequence[str]
    makes: Sequence[str]
    after: Sequence[str] = ()
    needs: str | None = None
    minutes: float | None = None

    @property
    def inputs(self) -> list[str]:
        return [*self.weights, *self.after]


def files(root: Path, patterns: Sequence[str]) -> list[Path]:
    """The files under `root` that any of the patterns means, in a fixed order."""
    return sorted({file for pattern in patterns for file in root.glob(pattern) if file.is_file()})


def digests(root: Path, patterns: Sequence[str]) -> Digests:
    """Of each pattern one digest of the names and contents of its files."""

    def digest(pattern: str) -> str:
        listed = [f"{file.relative_to(root).as_posix()} {file_digest(file)}" for file in files(root, [pattern])]
        return hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16]

    return {pattern: digest(pattern) for pattern in patterns}


class Made:
    """What each entry was made from, kept in a file of `root`."""

    def __init__(self, root: Path):
        self.root, self._file = root, root / RECORD
        self._from: dict[str, Digests] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def why(self, entry: Entry) -> str | None:
        """Why the entry has to be made, or None."""
        if entry.name not in self._from:
            return "not finished yet"
        before, now = self._from[entry.name], digests(self.root, entry.inputs)
        changed = [pattern for pattern in now if now[pattern] != before.get(pattern)]
        missing = [pattern for pattern in entry.makes if not files(self.root, [pattern])]
        if changed:
            return f"{', '.join(changed)} changed"
        return f"{', '.join(missing)} missing" if missing else None

    def due(self, entries: Sequence[Entry], again: Sequence[Entry] = ()) -> dict[Entry, str]:
        """Which of `entries` have to be made, in order, and why: also those of `again`, and what is made from any."""
        found: dict[Entry, str] = {}
        for entry in entries:
            inputs = {*files(self.root, entry.after)}
            above = [each.name for each in found if inputs & {*files(self.root, each.makes)}]
            why = "asked for" if entry in again else self.why(entry)
            if not why and above:
                why = f"made from {', '.join(above)}"
            if why and self.has_weights(entry):
                found[entry] = why
        return found

    def has_weights(self, entry: Entry) -> bool:
        return all(files(self.root, [pattern]) for pattern in entry.weights)

    def note(self, inputs: Mapping[Entry, Digests | None]) -> None:
        """Keep what entries were made from; None for one that is to be made again."""
        known = self._from | {entry.name: found for entry, found in inputs.items()}
        self._from = {name: found for name, found in known.items() if found is not None}
        with atomic_files([self._file]) as (file,):
            file.write_text(json.dumps(self._from, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def make(made: Made, entries: Sequence[Entry], again: Sequence[Entry], say: Callable[[str], object]) -> None:
    """Make what has to be made of `entries`; what is finished stays noted whatever becomes of the rest.

    Args:
        made: what was made before, and where.
        entries: in order: none is made from a later one.
        again: of these, those that are made even if nothing has changed.
        say: takes lines of progress.

    Raises:
        UserError: before anything is made, if something is missing that only a training makes; if a command fails, or
            does not make its files.
    """
    due = made.due(entries, again)
    if not due:
        say("everything is made from the weights that are here: nothing to do")
        return
    for entry, why in due.items():
        say(f"{entry.name}, {'time unknown' if entry.minutes is None else f'about {entry.minutes:g} min'}: {why}")
    for entry in due:
        if entry.needs and not (made.root / entry.needs).exists():
            raise UserError(
                f"{entry.name} tells how the weights were trained, and there is no {entry.needs}: put the training's "
                "folder there, say where it is with work=FOLDER, or leave this out with only=[...]"
            )
    made.note({entry: None for entry in due if entry in again})
    for entry in due:
        if not made.why(entry):
            say(f"{entry.name}: what it is made from came out as before")
            continue
        inputs = digests(made.root, entry.inputs)
        for command in entry.commands:
            say(f"{entry.name}: {command}")
            _run(command, entry.name, made.root)
        if missing := [pattern for pattern in entry.makes if not files(made.root, [pattern])]:
            raise UserError(f"{entry.name}: its commands did not make {', '.join(missing)}")
        made.note({entry: inputs})


def _run(command: str, name: str, root: Path) -> None:
    program, *words = shlex.split(command)
    with subprocess.Popen([sys.executable if program == "python" else program, *words], cwd=root) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reached it as well, and it removes what is half finished
            raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{name}: `{command}` ended with exit code {code}; put that right and start again")


def chosen(entries: Sequence[Entry], field: str, names: str | Sequence[str]) -> list[Entry]:
    """The entries that a field names: by name, by what stands before the slash, or all. UserError for another name."""
    names = [names] if isinstance(names, str) else names
    known = {ALL} | {part for entry in entries for part in (entry.name, entry.name.split("/")[0])}
    for name in names:
        if name not in known:
            raise UserError(f"{field}={name}: there is no such entry; choose from {', '.join(sorted(known))}")
    return [entry for entry in entries if {ALL, entry.name, entry.name.split("/")[0]} & {*names}]


def entries_of(cfg: DictConfig) -> list[Entry]:
    """The entries of configs/assets.yaml, in its order."""
    return [Entry(name, **fields) for name, fields in OmegaConf.to_container(cfg.made, resolve=True).items()]


def run(cfg: DictConfig) -> None:
    """Do what the fields of configs/assets.yaml say, and tell what differs from git's HEAD then."""
    entries, made = entries_of(cfg), Made(REPOSITORY)
    again, only, mark = (chosen(entries, field, cfg[field]) for field in ("again", "only", "mark"))
    if mark:
        there = {entry: digests(REPOSITORY, entry.inputs) for entry in mark if made.has_weights(entry)}
        made.note(there)
        print(f"noted as made from what is here: {', '.join(entry.name for entry in there) or 'none'}")
        return
    make(made, only, again, partial(print, flush=True))
    patterns = [pattern for entry in entries for pattern in entry.makes]
    by_hand = [page for page in pages() if page not in files(REPOSITORY, patterns)]
    print(report(REPOSITORY, patterns, by_hand), end="")


def main() -> None:
    commandline.prepare()

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="assets")
    def job(cfg: DictConfig) -> None:
        try:
            run(cfg)
        except UserError as error:
            commandline.fail(str(error), "assets")

    try:
        job()
    except KeyboardInterrupt:
        print("assets: interrupted; what was finished stays, and make assets goes on with the rest", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # raised by Hydra
        commandline.fail(commandline.explain(error, "assets", "put several in brackets, as [plans,teacache]"), "assets")


if __name__ == "__main__":
    main()
