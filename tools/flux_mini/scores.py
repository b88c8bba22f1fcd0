"""Scores of words and attributes: pure functions of what was asked and what was read."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from h2cache.eval.metrics.attributes import Attributes


@dataclass(frozen=True)
class Reading:
    """One image: what its prompt asked for and what was read from its pixels. `phrasing` is "known" or "held_out", or
    None where the prompts file does not tell."""

    word: str
    word_read: str
    attributes: Attributes
    attributes_read: Attributes
    phrasing: str | None = None


def levenshtein(a: str, b: str) -> int:
    """The fewest letters to insert, delete or replace to turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def word_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float | int]:
    """Of (asked, read) words: their count, how many are right, the share that is right, and the character error rate
    (edits per letter asked for, so it can exceed 1). ValueError without a word."""
    if not pairs:
        raise ValueError("no words to score")
    right = sum(asked == read for asked, read in pairs)
    edits = sum(levenshtein(asked, read) for asked, read in pairs)
    letters = sum(len(asked) for asked, _ in pairs)
    return {"count": len(pairs), "right": right, "accuracy": right / len(pairs), "cer": edits / letters}


def attribute_scores(pairs: Sequence[tuple[Attributes, Attributes]]) -> dict[str, float | int]:
    """Of (asked, read) attributes: the accuracy of each, their mean, and the share of images with all of them right.
    ValueError without an image."""
    if not pairs:
        raise ValueError("no attributes to score")
    right = {name: 0 for name in asdict(pairs[0][0])}
    for asked, read in pairs:
        for name, value in asdict(read).items():
            right[name] += value == getattr(asked, name)
    accuracies = {name: number / len(pairs) for name, number in right.items()}
    mean = sum(accuracies.values()) / len(accuracies)
    return {"count": len(pairs), **accuracies, "mean": mean, "all": sum(a == b for a, b in pairs) / len(pairs)}


def score(readings: Sequence[Reading], known_words: Iterable[str] = ()) -> dict[str, dict]:
    """Scores by group: over all, words of up to 5 letters and longer ones, by phrasing, and words that training knows
    apart from others. A group without an image is left out."""
    known = set(known_words)
    groups = {
        "all": readings,
        "up_to_5_letters": [r for r in readings if len(r.word) <= 5],
        "over_5_letters": [r for r in readings if len(r.word) > 5],
        "known_phrasing": [r for r in readings if r.phrasing == "known"],
        "held_out_phrasing": [r for r in readings if r.phrasing == "held_out"],
        "known_words": [r for r in readings if r.word in known],
        "held_out_words": [r for r in readings if r.word not in known],
    }
    return {
        name: {
            "words": word_scores([(r.word, r.word_read) for r in group]),
            "attributes": attribute_scores([(r.attributes, r.attributes_read) for r in group]),
        }
        for name, group in groups.items()
        if group
    }
