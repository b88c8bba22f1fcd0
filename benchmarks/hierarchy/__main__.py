"""Does the hierarchy pay for calibrated plans? `python -m benchmarks.hierarchy`.

Searches the plans of the embedded model whose steps compute both stages, one of them alone, or none, at equal work
(multiply-adds of the blocks), and measures the best of each family on held-out prompts with weights that were fitted on
others. Writes its tables into docs/frontier.md.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console

from benchmarks.methods import write_between
from eval.models.pipelines import load_pipeline
from h2cache.plans import record
from tools.calibration_prompts import scene_prompts

from .experiment import Experiment, Prompts, computed_steps, work_of_stages
from .report import table

ROOT = Path(__file__).resolve().parents[2]
PROMPT_SEED = 1  # of the calibration prompts: others than those that the embedded plans were calibrated on
NOISE = 1000  # the first seed of their noise; the held-out prompts have 0, 1, ...


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    model = instantiate(OmegaConf.load(ROOT / "configs/model/flux-mini.yaml"), device="cpu")
    pipe, call = load_pipeline(model), dict(model.call_arguments)
    recorded = partial(record, pipe, steps=call.pop("num_inference_steps"), **call)
    lines = (ROOT / "assets/prompts/signs80.jsonl").read_text(encoding="utf-8").splitlines()[: options.prompts]
    held_out = [json.loads(line)["prompt"] for line in lines]
    calibration = scene_prompts(options.fit, PROMPT_SEED)
    fit = recorded(prompts=calibration, seed=NOISE, batch_size=options.fit)
    prompts = Prompts(fit.first(options.search), fit, recorded(prompts=held_out, seed=0, batch_size=len(held_out)))
    tables = []
    for budget in options.budgets:
        work = work_of_stages(fit, budget)
        plan = ROOT / f"assets/plans/flux-mini-{budget:g}.json"
        start = computed_steps(plan, fit.steps, work.budget // (work.structure + work.detail))
        experiment = Experiment(prompts, work, options.rounds, options.seed, console.print)
        tables.append(table(list(experiment.run(start)), work, budget))
        print(tables[-1], flush=True)
    share = work.structure / (work.structure + work.detail)
    budgets = " ".join(f"{budget:g}" for budget in options.budgets)
    text = (
        f"`python -m benchmarks.hierarchy --prompts {len(held_out)} --rounds {options.rounds} "
        f"--search {options.search} --fit {options.fit} --budgets {budgets} --seed {options.seed} "
        f"--threads {options.threads}`: plans are scored on {options.search} prompts, their weights fitted on "
        f"{options.fit}, and {len(held_out)} are held out; the structure stage has {share:.1%} of the blocks' "
        "multiply-adds."
    )
    write_between(options.page, "hierarchy", "\n\n".join([text, *tables]))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hierarchy", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24, help="how many of assets/prompts/signs80.jsonl are held out")
    parser.add_argument("--rounds", type=int, default=100, help="plans that each search scores")
    parser.add_argument("--search", type=int, default=4, help="prompts that each plan is scored on")
    parser.add_argument("--fit", type=int, default=12, help="prompts that the best plans' weights are fitted on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.0], help="how many times fewer blocks")
    parser.add_argument("--seed", type=int, default=0, help="of the searches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/frontier.md")
    options = parser.parse_args(arguments)
    if options.search > options.fit:
        parser.error(f"--search {options.search}: the search's prompts are among the --fit {options.fit}")
    return options


if __name__ == "__main__":
    main()
