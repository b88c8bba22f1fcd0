"""`run.py` and `h2cache generate`: Hydra composes configs/, eval/cli/draw.py does the work.

Whatever the user can put right is one sentence on stderr and exit code 2; Ctrl-C is 130. torch is imported only for a
command that is well formed.
"""

import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from h2cache.eval.cli import arguments as commandline
from h2cache.eval.cli.progress import importing
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS

PROGRAM = "run.py"
FIELDS = ("prompt", "image", "seed", "out", "compare", "model", "method")
PLAIN_TEXT = ("prompt", "image", "out")  # fields whose value is taken as typed


def main(program: str = PROGRAM) -> None:
    """Do what `sys.argv` says.

    Args:
        program: what errors call the program.
    """
    commandline.prepare()

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="run")
    def job(cfg: DictConfig) -> None:
        _job(cfg, program)

    try:
        with tempfile.TemporaryDirectory() as scratch:
            sys.argv[1:] = command_line(sys.argv[1:], scratch)
            job()
    except KeyboardInterrupt:
        print(
            f"{program}: interrupted; images that are finished stay, and the same command begins anew", file=sys.stderr
        )
        sys.exit(130)
    except Exception as error:  # raised by Hydra, before or between jobs
        commandline.fail(
            commandline.explain(error, program, "add -m to draw one image for each of the values"), program
        )


def _job(cfg: DictConfig, program: str) -> None:
    """One job of a run or multirun. It leaves by SystemExit, since Hydra adds words of its own to an exception."""
    composed = HydraConfig.get()
    number = composed.job.num if composed.mode == RunMode.MULTIRUN else None
    try:
        check(cfg, composed.runtime.choices)
        with importing():
            from h2cache.eval.cli.draw import run

        run(cfg, dict(composed.runtime.choices), number)
    except UserError as error:
        commandline.fail(str(error), program)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def check(cfg: DictConfig, choices: Mapping[str, str]) -> None:
    """Raise UserError for values that need no torch to be refused."""
    if not isinstance(cfg.get("doctor", False), bool):
        raise UserError(f"doctor={cfg.doctor} is not allowed: it must be true or false")
    if wrong := set(cfg) - {"doctor"} ^ set(FIELDS):
        raise UserError(f"unknown or missing: {', '.join(sorted(wrong))}; the fields are {', '.join(FIELDS)}")
    seed = cfg.seed
    if not (isinstance(seed, int) and 0 <= seed < 2**63) or isinstance(seed, bool):
        raise UserError(f"seed={seed} is not allowed: it must be a whole number from 0 to 2**63 - 1")
    if not isinstance(cfg.compare, bool):
        raise UserError(f"compare={cfg.compare} is not allowed: it must be true or false")
    suffixes = (".png", ".mp4") if OmegaConf.select(cfg, "model.num_frames") else (".png",)
    if Path(str(cfg.out)).suffix not in suffixes:
        raise UserError(f"out={cfg.out} is not allowed: it must end in {' or '.join(suffixes)}")
    for group in ("model", "method"):
        file = CONFIGS / group / f"{choices[group]}.yaml"
        for field, value in _words_for_numbers(cfg[group], file) if file.is_file() else ():
            raise UserError(f"{group}={choices[group]}: {field}={value!r} is not allowed: it must be a number")


def _words_for_numbers(given: DictConfig, file: Path) -> Iterator[tuple[str, Any]]:
    """Fields that are text where the option's file has a number; `auto` is left to the class, which may allow it."""
    values = OmegaConf.to_container(given)
    for field, default in OmegaConf.to_container(OmegaConf.load(file)).items():  # plain: a field may have no value yet
        value = values.get(field)
        if isinstance(default, int | float) and isinstance(value, str) and value != "auto" and "${" not in value:
            yield field, value


def command_line(arguments: list[str], scratch: str) -> list[str]:
    """What the user typed as Hydra wants it: the flag first, text quoted, a multirun's notes in a scratch folder."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    overrides = [as_typed(argument, bool(flags)) for argument in arguments if argument not in flags]
    return [*flags, *overrides, *([f"hydra.sweep.dir={scratch}"] if flags else [])]


def as_typed(argument: str, multirun: bool) -> str:
    """The argument with the value of a plain-text field quoted for Hydra."""
    return commandline.as_typed(argument, PLAIN_TEXT, multirun)
