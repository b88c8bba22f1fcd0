"""Scores of a search, kept in a file, and how far the search has come."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .search import Steps


@dataclass
class Progress:
    """Counts what was tried, of at most `total`."""

    tell: Callable[[int, int, float], None]
    total: int
    done: int = 0
    best: float = float("-inf")

    def note(self, score: float) -> None:
        self.done, self.best = self.done + 1, max(self.best, score)
        self.tell(self.done, self.total, self.best)


class Store:
    """Scores that were paid for, in a file. A search that is repeated with them asks for the same and pays only for
    what is new: that is how it resumes."""

    def __init__(self, path: Path | None, request: str, known: dict[str, float]):
        self.path, self.request, self.known = path, request, known

    @classmethod
    def open(cls, path: str | Path | None, asked: dict[str, Any]) -> "Store":
        """What is known of a request; nothing, where the file is of another one or not there."""
        text = json.dumps(asked, sort_keys=True, default=str)
        request = hashlib.sha256(text.encode()).hexdigest()
        path = None if path is None else Path(path)
        if path is not None and path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["request"] == request:
                return cls(path, request, held["scores"])
        return cls(path, request, {})

    def scorer(self, score_of: Callable[[Steps], float], progress: Progress) -> Callable[[Steps], float]:
        """The score of a schedule, asked once."""

        def score(computed: Steps) -> float:
            key = " ".join(map(str, computed))
            if key not in self.known:
                self.known[key] = score_of(computed)
                self._save()
            progress.note(self.known[key])
            return self.known[key]

        return score

    def _save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps({"request": self.request, "scores": self.known}), encoding="utf-8")
        os.replace(draft, self.path)
