"""What is compared: one setting of one method, and how it is put on a pipeline and taken off again."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from diffusers import FluxPipeline

OURS = "this repository"


@dataclass(frozen=True)
class Contender:
    """A row-to-be. `library` says whose code runs, and which copy of the transformer it runs on.

    `attach(pipe)` caches inside its `with` block, and leaves the transformer computing as before.
    """

    library: str
    method: str
    setting: str
    attach: Callable[[FluxPipeline], AbstractContextManager]

    @property
    def name(self) -> str:
        """Unique among contenders."""
        return f"{self.library}: {self.method}, {self.setting}"

    @property
    def is_ours(self) -> bool:
        return self.library == OURS


def described(**fields: object) -> str:
    """`interval = 3, order = 1`."""
    return ", ".join(f"{name} = {value}" for name, value in fields.items())
