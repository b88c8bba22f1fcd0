"""For the docs site: `Fields:` and `Class attributes:` of a docstring are sections, as `Attributes:` is.

The reference (`mkdocs.yml`) loads this as an extension of griffe, which reads the docstrings.
"""

import re
from typing import Any

import griffe

SECTIONS = re.compile(r"^( *)(?:Fields|Class attributes)\b.*:$", re.MULTILINE)


class Fields(griffe.Extension):
    """Renames the sections when griffe has found a class."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called for every class that griffe reads."""
        if cls.docstring:
            cls.docstring.value = SECTIONS.sub(r"\1Attributes:", cls.docstring.value)
