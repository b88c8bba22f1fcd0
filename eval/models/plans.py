"""The method `plan` of configs/: a calibrated plan, by the name of its file."""

from pathlib import Path
from typing import Any

from h2cache import PlanConfig
from h2cache.eval.files import REPOSITORY, find_file


def plan_config(plan: str, **fields: Any) -> PlanConfig:
    """The plan in a file, seen from where you are or from this repository. ValueError where there is none."""
    file = find_file(plan)
    if file is None:
        raise ValueError(
            f"plan={plan}: no such file, seen from {Path.cwd()} or from {REPOSITORY}; make one with "
            "python -m tools.calibrate"
        )
    return PlanConfig(str(file), **fields)
