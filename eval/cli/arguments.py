"""What the programs share that Hydra configures: the words for its errors, and text taken as typed."""

import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig

from h2cache.eval.files import CONFIGS


def prepare() -> None:
    """Set what every program wants before it starts.

    Hydra raises instead of printing and ending the process. A terminal without Unicode gets question marks instead of a
    traceback.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def as_typed(argument: str, fields: Sequence[str], multirun: bool) -> str:
    """Quote the value of a plain-text field for Hydra, whose grammar has its own use for commas, quotes and brackets.

    Left alone: what is quoted for Hydra already, and in a multirun what Hydra reads as a sweep.
    """
    key, equals, value = argument.partition("=")
    if key not in fields or not equals:
        return argument
    try:
        is_sweep = OverridesParser.create().parse_override(argument).is_sweep_override()
        if (multirun and is_sweep) or (not is_sweep and value[0] == value[-1] and value[0] in "\"'"):
            return argument
    except (HydraException, IndexError):
        pass
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"{key}='{escaped}'"


def explain(error: Exception, program: str, several: str) -> str:
    """Hydra's error in one sentence: what is wrong, and what may stand there. `several`: how to give several values."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group == "teacache" and (CONFIGS / f"model/{option}.yaml").is_file():  # which method=teacache asks for
            return (
                f"model={option} has no TeaCache polynomial: fit one with `python -m tools.fit_teacache "
                f"model={option}`, or choose another method, such as method=h2cache"
            )
        options = error.options or sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        return f"{group}={option}: there is no such {group}; choose {group}={' or '.join(options)}"
    parent = getattr(error.__cause__, "parent_node", None)
    if isinstance(parent, DictConfig):
        *group, field = error.__cause__.full_key.split(".")
        fields = [str(key) for key in parent if key not in ("hydra", "_target_")]
        return f"there is no field {field} in {'.'.join(group) or program}; choose from {', '.join(fields) or 'none'}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write field=value, with quotes for Hydra around special characters"
    reason, *advice = str(error).split("\n")
    if reason.startswith("Ambiguous value"):
        advice = [several]
    return f"{reason}; {advice[0] if advice else f'see python {program} --help'}"


def fail(message: str, program: str) -> NoReturn:
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
