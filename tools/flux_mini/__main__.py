"""All of flux-mini with one command: `python -m tools.flux_mini --work build/flux-mini`.

Each stage is a command of its own (`python -m tools.flux_mini.vae --help`), keeps its checkpoint and its log in the
work folder, and goes on from there when it was killed.
"""

from .card import write_card
from .export import export
from .recipe import STAGES
from .training import recipe_options, run_stages


def main() -> None:
    options = recipe_options(__doc__, "assets/flux-mini")
    run_stages("tools.flux_mini", STAGES, options)
    export(options.work, "distilled.pt", options.folder)
    write_card(options.work, options.folder)


if __name__ == "__main__":
    main()
