"""Every method here against cache-dit and diffusers, on the embedded model: `python -m benchmarks.pareto`.

First each method's settings are swept on a few prompts, and those next to 3x, 4x and 6x on its frontier are kept; these
are then compared on other prompts. All draw the same prompts with the same noise, in one process, in turns. Makes
docs/frontier.md's tables and picture, and benchmarks/results/frontier.csv. Can be stopped and started again.
"""

import argparse
import contextlib
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress

from eval.models.pipelines import ModelConfig, load_pipeline

from .frontier import around, at_speedup, frontier
from .frontier_report import SPEEDUPS, Method, draw, gains, methods, table, verdict, write_csv
from .measure import Bench, Record, Records, Task
from .methods import write_between
from .peers import OURS, Contender, assemble
from .peers.ours import PLAN

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "assets/prompts/signs80.jsonl"


def tasks(phase: str, rows: range) -> list[Task]:
    """Prompts of the set by their place in it, which is their seed as well."""
    lines = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    return [Task(phase, lines[row]["id"], lines[row]["prompt"], row) for row in rows]


def subject(model: ModelConfig) -> dict[str, object]:
    """What records must have in common to be compared."""
    settings = dict(model=model.path, threads=torch.get_num_threads(), machine=platform.machine())
    return settings | model.call_arguments | versions()


def versions() -> dict[str, str]:
    """Of what is compared, as far as it is installed."""
    found = {}
    for package in ("torch", "diffusers", "cache-dit"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def thinned(contenders: Sequence[Contender], step: int) -> list[Contender]:
    """Plans, and one in `step` of every other method's settings."""
    seen: dict[tuple[str, str], int] = {}
    kept = []
    for contender in contenders:
        key = contender.library, contender.method
        seen[key] = seen.get(key, -1) + 1
        if contender.method == PLAN or seen[key] % step == 0:
            kept.append(contender)
    return kept


def measure(bench: Bench, records: Records, todo: Sequence[Task], contenders: Sequence[Contender]) -> None:
    """Draw what has no record yet."""
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(todo[0].phase, total=len(todo) * len(contenders))
        for task in todo:
            left = [contender for contender in contenders if not records.has(task, contender)]
            progress.advance(bar, len(contenders) - len(left))
            for found in bench.measure(task, left) if left else ():
                records.add(found)
                progress.advance(bar, len(found))


def of(tasks: Sequence[Task], records: Records) -> list[Record]:
    """Their records alone: the file may have those of more prompts."""
    keys = {(task.phase, task.id) for task in tasks}
    return [record for record in records.records if (record.phase, record.prompt) in keys]


def promising(found: Sequence[Method], contenders: Sequence[Contender]) -> list[Contender]:
    """What is left to sweep after one prompt: without settings far outside of the speedups, if a method has others."""
    slowest, fastest = SPEEDUPS[0] / 1.7, SPEEDUPS[-1] * 1.5
    dropped = {
        (method.library, method.name, point.setting)
        for method in found
        if method.frontier[-1].speedup >= SPEEDUPS[0] and method.name != PLAN
        for point in method.points
        if not slowest <= point.speedup <= fastest
    }
    return [each for each in contenders if (each.library, each.method, each.setting) not in dropped]


def select(found: Sequence[Method], contenders: Sequence[Contender]) -> list[Contender]:
    """Settings for the comparison: those next to the speedups on each frontier, else its two fastest; and all plans."""
    names = set()
    for method in found:
        kept = around(method.frontier, SPEEDUPS) if method.name != PLAN else method.points
        if method.frontier[-1].speedup < SPEEDUPS[0]:
            kept = method.frontier[-2:]
        names |= {(method.library, method.name, point.setting) for point in kept}
    return [each for each in contenders if (each.library, each.method, each.setting) in names]


def champion_of(tuned: Sequence[Method], tested: Sequence[Method]) -> Method:
    """The plan where there is one, else the method of ours that was best at 4x on the prompts for choosing."""
    ours = [method for method in tuned if method.library == OURS]
    plans = [method for method in ours if method.name == PLAN]

    def at_four(method: Method) -> float:
        psnr = at_speedup(frontier(method.points), 4.0, "psnr")
        return float("-inf") if psnr is None else float(psnr.mean())

    chosen = plans[0] if plans else max(ours, key=at_four)
    return next(method for method in tested if (method.library, method.name) == (chosen.library, chosen.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24, help="to compare on: the first of signs80.jsonl")
    parser.add_argument("--tuning", type=int, default=3, help="to choose settings on: the last of signs80.jsonl")
    parser.add_argument("--quick", action="store_true", help="8 and 2 prompts at most, and a quarter of the settings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plans", type=Path, default=ROOT / "assets/plans")
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks/results/frontier.jsonl")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/frontier.csv")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/frontier.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/frontier.png")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.tuning = min(options.prompts, 8), min(options.tuning, 2)
    torch.set_num_threads(options.threads)
    model = instantiate(OmegaConf.load(ROOT / "configs/model/flux-mini.yaml"), device="cpu")
    tea = OmegaConf.load(ROOT / "configs/teacache/flux-mini.yaml")
    pipe, call = load_pipeline(model), model.call_arguments
    total = len(PROMPTS.read_text().splitlines())
    if not 2 <= options.prompts <= total - options.tuning:
        parser.error(f"--prompts {options.prompts}: from 2 to {total - options.tuning}, the rest is for --tuning")
    tuning, test = tasks("tune", range(total - options.tuning, total)), tasks("test", range(options.prompts))
    contenders, left_out = assemble(pipe, [task.prompt for task in tuning[:2]], call, tea.coefficients, options.plans)
    if options.quick:
        contenders = thinned(contenders, 4)
    records = Records(options.records, subject(model))
    with Bench(pipe, sorted({each.library for each in contenders}), call) as bench:
        measure(bench, records, tuning[:1], contenders)
        contenders = promising(methods(of(tuning[:1], records), contenders, "tune"), contenders)
        measure(bench, records, tuning, contenders)
        tuned = methods(of(tuning, records), contenders, "tune")
        selected = select(tuned, contenders)
        measure(bench, records, test, selected)
        left_out |= {name.upper(): why for name, why in bench.metrics.unavailable.items()}
    shown = of(test, records)
    tested = methods(shown, selected, "test")
    champion = champion_of(tuned, tested)
    write_csv(shown, selected, options.csv)
    draw(tested, champion, options.picture)
    command = f"python -m benchmarks.pareto{' --quick' if options.quick else ''}"
    command += f" --prompts {options.prompts} --tuning {options.tuning}"
    what = ", ".join(
        f"{name} {value}" for name, value in subject(model).items() if name in ("torch", "diffusers", "cache-dit")
    )
    parts = {
        "frontier": f"`{command} --threads {options.threads}`: {what}.\n\n{table(tested)}",
        "verdict": f"{verdict(tested, champion)}\n\n{gains(tested, champion)}",
        "left-out": "\n".join(f"- {name}: {why}." for name, why in left_out.items()),
    }
    for name, text in parts.items():
        write_between(options.page, name, text)
    print(*parts.values(), sep="\n\n")


if __name__ == "__main__":
    main()
