"""The experiments: `python -m eval experiment=[table1,frontier] model=flux-mini limit=8 out=results/flux-mini`.

`python -m eval rescore out=results/flux-mini` measures the images of such a run again, and draws none;
`python -m eval votes FILES` counts what people preferred (eval/cli/votes.py).

This file is the command line: Hydra composes configs/eval.yaml, eval/experiments/harness.py does the
work. Whatever the user can put right is one sentence on stderr and exit code 2; images that could not be drawn are 1;
Ctrl-C is 130.
"""

import shlex
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from h2cache.eval.cli import arguments as commandline
from h2cache.eval.cli import votes
from h2cache.eval.cli.progress import importing
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS

PROGRAM = "eval"
RESCORE, VOTES = "rescore", "votes"  # a word before the fields
PLAIN_TEXT = ("out", "prompts.path", "metric_weights")  # fields whose value is taken as typed


def _job(cfg: DictConfig, program: str, rescores: bool) -> None:
    """What Hydra calls. It leaves by SystemExit, since Hydra adds words of its own to an exception."""
    with importing():
        from h2cache.eval.experiments import harness

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
        given = OmegaConf.to_container(composed.overrides, resolve=False)  # as typed, ${...} too
        overrides = [*given["hydra"], *given["task"]]
        do = harness.rescore if rescores else harness.run
        sys.exit(do(cfg, model, method, command, overrides))
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
    arguments = sys.argv[1:]
    if arguments[:1] == [VOTES]:
        return votes.typed(arguments[1:], f"{program} {VOTES}")
    rescores = arguments[:1] == [RESCORE]

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="eval")
    def job(cfg: DictConfig) -> None:
        _job(cfg, program, rescores)

    if {"-m", "--multirun"} & set(arguments):
        commandline.fail("there is no multirun here: experiment=[table1,frontier] does several in one run", program)
    arguments = [commandline.as_typed(argument, PLAIN_TEXT, multirun=False) for argument in arguments]
    try:
        sys.argv[1:] = _of_the_run(arguments[1:]) if rescores else arguments
        job()
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        commandline.fail(str(error), program)
    except Exception as error:  # raised by Hydra
        commandline.fail(commandline.explain(error, "-m eval", "put several values in brackets, as [1,2]"), program)


def _of_the_run(given: Sequence[str]) -> list[str]:
    """The fields of the run whose results are in the folder `out=` of the fields `given`, and these instead of them."""
    from h2cache.eval.experiments.harness import facts_of

    outs = [value.strip("'") for name, _, value in (field.partition("=") for field in given) if name == "out"]
    if not outs:
        raise UserError(f"{RESCORE} needs the folder of a run: {RESCORE} out=results")
    facts = facts_of(Path(outs[-1]).expanduser())
    fields = facts["overrides"] if "overrides" in facts else _typed(facts.get("command", ""))
    named = {_name(field) for field in given}
    return [*(field for field in fields if _name(field) not in named), *given]


def _typed(command: str) -> list[str]:
    """The fields in a command of `python -m eval`: older runs kept nothing else."""
    _, module, fields = command.partition("-m eval")
    return [commandline.as_typed(field, PLAIN_TEXT, multirun=False) for field in shlex.split(fields)] if module else []


def _name(field: str) -> str:
    return field.partition("=")[0].lstrip("+~")
