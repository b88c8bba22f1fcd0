"""Prompts of a plain text file."""

from pathlib import Path

from h2cache.eval.errors import UserError


def prompt_lines(file: Path, count: int | None = None) -> list[str]:
    """The prompts of a file that has one a line; blank lines are left out.

    Args:
        file: in UTF-8.
        count: how many; None: all.

    Raises:
        UserError: if the file cannot be read or has too few.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read prompts from {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) < (count or 1):
        raise UserError(f"{file} has {len(prompts)} prompts, one a line, and {count or 1} are needed")
    return prompts[:count]
