"""Draw an image with a Flux model and a cache: `python run.py prompt="a cat" method.tau1=0.1 seed=3 out=cat.png`.

This file is the command line: Hydra composes configs/, eval/job.py does the work. Whatever the user can put right is
one sentence on stderr and exit code 2; Ctrl-C is 130. torch is imported only for a command that is well formed.
"""

import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig

from eval.errors import UserError

CONFIGS = Path(__file__).resolve().parent / "configs"
PLAIN_TEXT = ("prompt", "out")  # fields whose value is taken as typed


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="run")
def job(cfg: DictConfig) -> None:
    """One job of a run or multirun. It leaves by SystemExit, since Hydra adds words of its own to an exception."""
    from eval.job import run

    composed = HydraConfig.get()
    number = composed.job.num if composed.mode == RunMode.MULTIRUN else None
    try:
        run(cfg, dict(composed.runtime.choices), number)
    except UserError as error:
        fail(str(error))
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and ending the process
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode gets question marks, not a traceback
    try:
        with tempfile.TemporaryDirectory() as scratch:
            sys.argv[1:] = command_line(sys.argv[1:], scratch)
            job()
    except KeyboardInterrupt:
        print("run.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # raised by Hydra, before or between jobs
        fail(explain(error))


def command_line(arguments: list[str], scratch: str) -> list[str]:
    """What the user typed as Hydra wants it: the flag first, text quoted, a multirun's notes in a scratch folder."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    overrides = [as_typed(argument, bool(flags)) for argument in arguments if argument not in flags]
    return [*flags, *overrides, *([f"hydra.sweep.dir={scratch}"] if flags else [])]


def as_typed(argument: str, multirun: bool) -> str:
    """Quote the value of a plain-text field for Hydra, whose grammar has its own use for commas, quotes and brackets.

    Left alone: what is quoted for Hydra already, and in a multirun what Hydra reads as a sweep.
    """
    key, equals, value = argument.partition("=")
    if key not in PLAIN_TEXT or not equals:
        return argument
    try:
        is_sweep = OverridesParser.create().parse_override(argument).is_sweep_override()
        if (multirun and is_sweep) or (not is_sweep and value[0] == value[-1] and value[0] in "\"'"):
            return argument
    except (HydraException, IndexError):
        pass
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"{key}='{escaped}'"


def explain(error: Exception) -> str:
    """Hydra's error in one sentence: what is wrong, and what may stand there."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={option}: there is no such {group}; choose {group}={' or '.join(error.options)}"
    parent = getattr(error.__cause__, "parent_node", None)
    if isinstance(parent, DictConfig):
        *group, field = error.__cause__.full_key.split(".")
        fields = [str(key) for key in parent if key not in ("hydra", "_target_")]
        return f"there is no field {field} in {'.'.join(group) or 'run.py'}; choose from {', '.join(fields) or 'none'}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write field=value, with quotes for Hydra around special characters"
    reason, *advice = str(error).split("\n")
    if reason.startswith("Ambiguous value"):
        advice = ["add -m to draw one image for each of the values"]
    return f"{reason}; {advice[0] if advice else 'see python run.py --help'}"


def fail(message: str) -> NoReturn:
    print(f"run.py: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
