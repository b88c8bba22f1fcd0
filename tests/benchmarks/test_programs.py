"""Every program of benchmarks/ and tools/ can be imported: what they share may move."""

import importlib

import pytest
from repository import REPOSITORY

PROGRAMS = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for folder in ("benchmarks", "tools")
    for path in (REPOSITORY / folder).rglob("*.py")
    if path.stem not in ("__init__", "__main__")
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_can_be_imported(name):
    importlib.import_module(name)
