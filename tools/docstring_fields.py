"""For the docs site: docstrings as this repository writes them, in the form that griffe reads.

The reference (`mkdocs.yml`) loads this as an extension of griffe. `Fields:` and `Class attributes:` become sections as
`Attributes:` is, and one line may describe several: `tau1, tau2: thresholds`.
"""

import re
from typing import Any

import griffe

SECTIONS = re.compile(r"^( *)(?:Fields|Class attributes)\b.*:$", re.MULTILINE)
SEVERAL = re.compile(r"^ +\w+(?:, \w+)+(?=: )", re.MULTILINE)
UNBROKEN = "\N{NO-BREAK SPACE}"  # griffe takes what follows a plain space for a type


class Fields(griffe.Extension):
    """Rewrites docstrings when griffe has found their owners."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called for every class that griffe reads."""
        self._rewrite(cls)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Called for every function and method."""
        self._rewrite(func)

    def _rewrite(self, owner: griffe.Object) -> None:
        if owner.docstring:
            text = SECTIONS.sub(r"\1Attributes:", owner.docstring.value)
            owner.docstring.value = SEVERAL.sub(lambda names: names[0].replace(", ", f",{UNBROKEN}"), text)
