"""What people preferred: the files of votes that the page exports, counted."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from scipy import stats

from h2cache.eval.errors import UserError
from h2cache.eval.report.tables.quantities import MEANINGLESS
from h2cache.eval.report.tables.sheet import Sheet

FORMAT = "h2cache-votes-1"  # the page's (templates/ballot.js)
LEVEL = 0.05  # of significance, of all the tests of a table together


@dataclass(frozen=True)
class Vote:
    """One pair as one person saw it: a setting's image of a prompt beside that of `against`.

    Fields:
        preferred: `setting`, `against`, or None for no difference.
    """

    model: str
    experiment: str
    voter: str
    prompt: str
    setting: str
    against: str
    preferred: str | None


@dataclass(frozen=True)
class Preference:
    """How often a setting's image was preferred to that of the baseline.

    Fields:
        rate: of wins, of the votes that prefer one; NaN without any. low, high: Wilson's 95 % interval of it.
        p: of the exact two-sided sign test that both are equally likely.
    """

    wins: int
    losses: int
    ties: int
    rate: float
    low: float
    high: float
    p: float


def read_votes(files: Sequence[Path]) -> list[Vote]:
    """The votes in all files, each voter's on a pair once: the one that was read last.

    Raises:
        UserError: a file holds no votes, or the files are of several experiments or models.
    """
    votes: dict[tuple[str, str, str], Vote] = {}
    for file in files:
        for vote in _read(file):
            votes[vote.voter, vote.prompt, vote.setting] = vote
    if len({(vote.model, vote.experiment, vote.against) for vote in votes.values()}) > 1:
        found = sorted({f"{vote.experiment} on {vote.model}" for vote in votes.values()})
        raise UserError(f"the votes are of several experiments ({', '.join(found)}); give the files of one at a time")
    if not votes:
        raise UserError("there are no votes in these files; export some from the page, under Blind preference")
    return list(votes.values())


def _read(file: Path) -> list[Vote]:
    try:
        told = json.loads(file.read_bytes())
        if told["format"] != FORMAT:
            raise ValueError("another format")
        about = {name: str(told[name]) for name in ("model", "experiment", "voter")}
        votes = [
            Vote(**about, **{name: each[name] for name in ("prompt", "setting", "against", "preferred")})
            for each in told["votes"]
        ]
        if wrong := [vote for vote in votes if vote.preferred not in (vote.setting, vote.against, None)]:
            raise ValueError(f"preferred={wrong[0].preferred!r} is neither of a pair")
        return votes
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds no votes of the page's Blind preference ({error})") from error


def preference(votes: Sequence[Vote]) -> Preference:
    """Of the votes on one setting."""
    wins = sum(vote.preferred == vote.setting for vote in votes)
    losses = sum(vote.preferred == vote.against for vote in votes)
    ties = len(votes) - wins - losses
    if wins + losses == 0:
        return Preference(wins, losses, ties, float("nan"), float("nan"), float("nan"), 1.0)
    test = stats.binomtest(wins, wins + losses)
    interval = test.proportion_ci(method="wilson")
    return Preference(
        wins, losses, ties, wins / (wins + losses), float(interval.low), float(interval.high), float(test.pvalue)
    )


def table(votes: Sequence[Vote]) -> tuple[Sheet, pd.DataFrame]:
    """A row for each setting, by first appearance; and the same at full precision."""
    names = dict.fromkeys(vote.setting for vote in votes)
    found = {name: preference([vote for vote in votes if vote.setting == name]) for name in names}
    against, voters = votes[0].against, len({vote.voter for vote in votes})
    rows = tuple((name, str(p.wins), str(p.losses), str(p.ties), *_texts(p)) for name, p in found.items())
    header = ("setting", f"preferred to {against}", "not preferred", "no difference", "win rate", "95 % interval", "p")
    beyond = [name for name, each in found.items() if each.p * len(found) < LEVEL]
    level = f"p < {LEVEL:g} over {len(found)} tests, Bonferroni"
    notes = (
        f"Beyond chance ({level}): {', '.join(beyond)}."
        if beyond
        else f"No setting is preferred or rejected beyond chance ({level}).",
        f"{len(votes)} votes of {voters} {'voter' if voters == 1 else 'voters'} on {votes[0].experiment}, "
        f"{votes[0].model}. Win rate: without the votes for no difference; its interval is Wilson's. p: exact "
        "two-sided sign test. Both take every vote as independent, also those of several voters on one pair.",
    )
    data = pd.DataFrame([{"setting": name, **asdict(each)} for name, each in found.items()])
    return Sheet("Blind preference", header, rows, notes), data


def _texts(found: Preference) -> tuple[str, str, str]:
    if not found.wins + found.losses:
        return (MEANINGLESS,) * 3
    interval = f"{100 * found.low:.0f} to {100 * found.high:.0f} %"
    return f"{100 * found.rate:.0f} %", interval, f"{found.p:.3f}"
