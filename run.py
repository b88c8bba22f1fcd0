"""Draw an image or a video with a cache: `python run.py prompt="a cat" method.tau1=0.1 seed=3 out=cat.png`.

This file is the command line: Hydra composes configs/, eval/cli/draw.py does the work. Whatever the user can put right
is one sentence on stderr and exit code 2; Ctrl-C is 130. torch is imported only for a command that is well formed.
"""

import logging
import sys
import tempfile
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from h2cache.eval.cli import arguments as commandline
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS

PROGRAM = "run.py"
PLAIN_TEXT = ("prompt", "out")  # fields whose value is taken as typed


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="run")
def job(cfg: DictConfig) -> None:
    """One job of a run or multirun. It leaves by SystemExit, since Hydra adds words of its own to an exception."""
    # diffusers imports bitsandbytes where it is installed, which warns of kernels that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from h2cache.eval.cli.draw import run

    composed = HydraConfig.get()
    number = composed.job.num if composed.mode == RunMode.MULTIRUN else None
    try:
        run(cfg, dict(composed.runtime.choices), number)
    except UserError as error:
        commandline.fail(str(error), PROGRAM)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def main() -> None:
    commandline.prepare()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            sys.argv[1:] = command_line(sys.argv[1:], scratch)
            job()
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # raised by Hydra, before or between jobs
        commandline.fail(
            commandline.explain(error, PROGRAM, "add -m to draw one image for each of the values"), PROGRAM
        )


def command_line(arguments: list[str], scratch: str) -> list[str]:
    """What the user typed as Hydra wants it: the flag first, text quoted, a multirun's notes in a scratch folder."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    overrides = [as_typed(argument, bool(flags)) for argument in arguments if argument not in flags]
    return [*flags, *overrides, *([f"hydra.sweep.dir={scratch}"] if flags else [])]


def as_typed(argument: str, multirun: bool) -> str:
    return commandline.as_typed(argument, PLAIN_TEXT, multirun)


if __name__ == "__main__":
    main()
