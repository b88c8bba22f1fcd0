"""The experiments: `python -m eval experiment=[table1,frontier] model=flux-mini limit=8 out=results/flux-mini`.

This file is the command line: Hydra composes configs/eval.yaml, eval/experiments/harness.py does the
work. Whatever the user can put right is one sentence on stderr and exit code 2; images that could not be drawn are 1;
Ctrl-C is 130.
"""

import shlex
import sys
import traceback
from functools import cache

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from h2cache.eval.cli import arguments as commandline
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS

PROGRAM = "eval"
PLAIN_TEXT = ("out", "prompts.path", "clipiqa_checkpoint")  # fields whose value is taken as typed


def _job(cfg: DictConfig, program: str) -> None:
    """What Hydra calls. It leaves by SystemExit, since Hydra adds words of its own to an exception."""
    from h2cache.eval.experiments.harness import run

    composed = HydraConfig.get()
    model = composed.runtime.choices["model"]

    @cache
    def method(option: str) -> DictConfig:
        """What configs/method has under this name for the model."""
        try:
            return compose("run", overrides=[f"model={model}", f"method={option}"]).method
        except Exception as error:  # raised by Hydra
            raise UserError(
                commandline.explain(error, "-m eval", "put several values in brackets, as [1,2]")
            ) from error

    command = shlex.join(["python", *sys.orig_argv[1:]])
    try:
        sys.exit(run(cfg, model, method, command))
    except UserError as error:
        commandline.fail(str(error), program)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def main(program: str = PROGRAM) -> None:
    """Do what `sys.argv` says.

    Args:
        program: what errors call the program.
    """
    commandline.prepare()

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="eval")
    def job(cfg: DictConfig) -> None:
        _job(cfg, program)

    if {"-m", "--multirun"} & set(sys.argv[1:]):
        commandline.fail("there is no multirun here: experiment=[table1,frontier] does several in one run", program)
    sys.argv[1:] = [commandline.as_typed(argument, PLAIN_TEXT, multirun=False) for argument in sys.argv[1:]]
    try:
        job()
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # raised by Hydra
        commandline.fail(commandline.explain(error, "-m eval", "put several values in brackets, as [1,2]"), program)
