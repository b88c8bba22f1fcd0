"""What the searches found, as Markdown."""

from collections.abc import Sequence

from benchmarks.frontier import mean_interval

from .experiment import Found
from .plans import Level, Work, drawn

HEADER = (
    "| a step computes | prompts of the fit, dB | held-out, dB | ahead of the first row, held-out | "
    "whole, structure, detail steps | work | plans scored |"
)


def table(found: Sequence[Found], work: Work, budget: float) -> str:
    """One row a family, and the plans below it. Differences are by prompt from the first family's, with 95 %
    intervals."""
    rows = [f"At {budget:g}x:", "", HEADER, "|---|---:|---:|---:|---:|---:|---:|"]
    for each in found:
        counts = [each.levels.count(level) for level in (Level.EVERYTHING, Level.STRUCTURE, Level.DETAIL)]
        whole = each.work / (work.structure + work.detail)
        rows.append(
            f"| {each.family.name} | {each.fit.mean():.2f} | {each.held_out.mean():.2f} | {_ahead(each, found[0])} | "
            f"{', '.join(map(str, counts))} | {whole:.2f} steps | {each.asked} |"
        )
    return "\n".join([*rows, "", "```text", *(f"{drawn(each.levels)}  {each.family.name}" for each in found), "```"])


def _ahead(each: Found, first: Found) -> str:
    if each is first:
        return ""
    value = mean_interval(each.held_out - first.held_out)
    return f"{value.mean:+.2f} ({value.low:+.2f} to {value.high:+.2f})"
