"""`h2cache plan show` and `export`: what a plan's file says, for people and for other programs."""

import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from h2cache import Plan
from h2cache.eval.cli.arguments import fail
from h2cache.plans.export import FORMATS


def show(file: Path) -> None:
    """Print the plan in `file`; exit code 2 where it holds none."""
    try:
        plan = Plan.load(file)
    except ValueError as error:
        fail(str(error), "h2cache plan show")
    console = Console(file=sys.stdout, highlight=False)
    made_for = {name: value for name, value in asdict(plan.made_for).items() if value is not None and name != "sigmas"}
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("computes", f"{len(plan.computed)} of {plan.steps} steps: {', '.join(map(str, plan.computed))}")
    facts.add_row("steps", "".join("#" if step in plan.computed else "." for step in range(plan.steps)))
    for name, value in {**made_for, **plan.notes, "promise": plan.promise or "none"}.items():
        facts.add_row(name.replace("_", " "), str(value))
    weights = Table("step", "weights of the last computed outputs, newest first", box=None, padding=(0, 2, 0, 0))
    for step, values in plan.weights.items():
        weights.add_row(str(step), ", ".join(f"{value:g}" for value in values))
    console.print(facts, "", weights)


def export(file: Path, form: str) -> None:
    """Write the plan in `file` to stdout for a program that we do not hook.

    Args:
        form: one of `h2cache.plans.export.FORMATS`. Exit code 2, with a sentence, for another, for a file without a
            plan, and for a plan that says no noise levels.
    """
    forms = dict(FORMATS)
    if form not in forms:
        fail(f"--format {form} is not allowed: choose {', '.join(forms)}", "h2cache plan export")
    try:
        sys.stdout.write(forms[form](Plan.load(file)))
    except ValueError as error:
        fail(str(error), "h2cache plan export")
