"""All of flux-mini-distilled with one command: `python -m tools.flux_mini_distilled --work build/flux-mini-distilled`.

The training (`python -m tools.flux_mini_distilled.train --help`) keeps the teacher's runs, its checkpoint and its log
in the work folder, and goes on from there when it was killed. It needs nothing but assets/flux-mini and a plan for it.
"""

from tools.flux_mini.training import recipe_options, run_stages

from .card import write_card
from .export import export
from .recipe import TRAINING


def main() -> None:
    options = recipe_options(__doc__, "assets/flux-mini-distilled")
    run_stages("tools.flux_mini_distilled", [("train", TRAINING)], options)
    export(options.work, options.folder)
    write_card(options.work, options.folder)


if __name__ == "__main__":
    main()
