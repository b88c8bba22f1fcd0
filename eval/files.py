"""Output files that appear whole or not at all."""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from h2cache.eval.errors import UserError

# The clone; or the installed package, which has configs/, the prompts and the plans as well, but no weights.
REPOSITORY = Path(__file__).resolve().parent.parent
IS_CLONE = (REPOSITORY / "pyproject.toml").is_file()
CONFIGS = REPOSITORY / "configs"


def file_digest(path: Path) -> str:
    """The first 16 digits of its SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def find_file(path: str | Path) -> Path | None:
    """The file of this name, seen from where you are or else from this repository; None if neither has it."""
    given = Path(path).expanduser()
    return next((file for file in (given, REPOSITORY / given) if file.is_file()), None)


def check_writable(targets: Sequence[Path]) -> None:
    """Raise UserError unless every target can be written; called before the work whose result goes there.

    Permissions, read-only mounts and over-long names are found by trying: no other answer is true for root as well.
    """
    for target in targets:
        try:
            if target.is_dir():
                raise UserError(f"cannot write {target}: it is a folder; give a file name")
            if not target.parent.is_dir():
                raise UserError(f"cannot write {target}: no folder {target.parent}; make it or change out=")
            trial = _beside(target)
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}; change out=") from error


@contextmanager
def atomic_files(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield a temporary path beside each target; when the block ends well, move them all into place.

    If it does not, even by Ctrl-C, the targets are as they were and the temporary files are gone. The suffix is kept,
    because writers choose their format by it.
    """
    temporary = [_beside(target) for target in targets]
    try:
        yield temporary
        for source, target in zip(temporary, targets, strict=True):
            source.replace(target)
    finally:
        for source in temporary:
            source.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    """A name nobody has in the target's folder: a rename is atomic only within one file system."""
    return target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
