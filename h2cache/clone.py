"""Finds `h2cache.baselines` and `h2cache.eval` in a clone, where their folders lie beside this package.

The wheel has them inside the package, so that it claims no other top-level name, and needs none of this. In a clone
`import baselines` works as well, and gives the same module.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
BESIDE = ("baselines", "eval")


def find_beside() -> None:
    """Let imports find the folders that lie beside the package, if they do."""
    if not (PACKAGE / BESIDE[0]).is_dir():
        sys.meta_path.insert(0, Beside())


class Beside(MetaPathFinder, Loader):
    """Finds `h2cache.eval` in the folder eval/, and `eval.x` as `h2cache.eval.x`.

    `eval` itself is found as usual, if the clone is where Python looks for modules. Its `__init__.py` then puts
    `h2cache.eval` in its own place.
    """

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Of the three kinds of names above; `python -m eval` runs the file `eval/__main__.py` under its own name."""
        top, _, rest = name.partition(".")
        if top == __package__ and rest in BESIDE:
            folder = PACKAGE.parent / rest
            return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        if (
            top in BESIDE
            and rest != "__main__"
            and sys.modules.get(top) is sys.modules.get(f"{__package__}.{top}", self)
        ):
            return ModuleSpec(name, self)
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the full name in the place of this one."""
        sys.modules[module.__name__] = import_module(f"{__package__}.{module.__name__}")
