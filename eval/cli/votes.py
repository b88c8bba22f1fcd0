"""`python -m eval votes FILES out=results`, or `h2cache votes FILES`: blind votes, counted."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from h2cache.eval.cli.arguments import fail
from h2cache.eval.errors import UserError

FOLDER, NAME = "votes", "preference"


def main(files: Sequence[Path], out: Path, program: str) -> None:
    """Write the table to the folder `votes` of `out` and print it; exit code 2 and a sentence where there is none."""
    from h2cache.eval.report.votes import read_votes, table

    try:
        sheet, data = table(read_votes(files))
        artifact = sheet.write(data, out / FOLDER, NAME, FOLDER)
    except UserError as error:
        fail(str(error), program)
    except OSError as error:
        fail(f"cannot write to {out / FOLDER}: {error.strerror}; change out=", program)
    console = Console(highlight=False, soft_wrap=True)
    console.print(sheet.to_rich())
    for line in (*sheet.notes, f"{artifact.title}: {', '.join(map(str, artifact.files))}"):
        console.print(line, markup=False)


def typed(arguments: Sequence[str], program: str) -> None:
    """The same, of the words of a command line: files, and `out=FOLDER` among them."""
    outs = [word.removeprefix("out=") for word in arguments if word.startswith("out=")]
    files = [Path(word) for word in arguments if not word.startswith("out=")]
    main(files, Path(outs[-1] if outs else "results"), program)
