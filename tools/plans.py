"""Plans as text: `python -m tools.plans show FILE` says what a plan does, what it was made for and what it promises;
`python -m tools.plans export FILE --format sigmas|k-diffusion|json` writes it for other programs, to stdout."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from h2cache import Plan
from h2cache.plans.export import FORMATS


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with one sentence on stderr for what the user can put right."""
    parser = argparse.ArgumentParser(prog="plans", description=__doc__.split(":")[0] + ".")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("show", "say what it does"), ("export", "write it for other programs")):
        command = commands.add_parser(name, help=what)
        command.add_argument("file", type=Path, help="a plan, as Plan.save writes it")
        if name == "export":
            command.add_argument("--format", choices=[each for each, _ in FORMATS], default="json")
    asked = parser.parse_args(arguments)
    try:
        plan = Plan.load(asked.file)
        text = described(plan) if asked.command == "show" else dict(FORMATS)[asked.format](plan)
    except OSError as error:
        print(f"plans: error: {asked.file}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"plans: error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(text)
    return 0


def described(plan: Plan) -> str:
    """A few lines."""
    made_for, steps = plan.made_for, ", ".join(map(str, plan.computed))
    lines = [
        f"computes {len(plan.computed)} of {plan.steps} steps ({plan.steps / len(plan.computed):.3g}x fewer): {steps}",
        f"looks back on {plan.history} outputs",
        f"for {made_for.model or 'any model'}; guidance {made_for.guidance}; {made_for.image_tokens} image tokens",
        *(f"{name}: {value}" for name, value in plan.notes.items() if name != "promise"),
        f"promise: {plan.promise or 'none'}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
