"""All of hunyuan-mini with one command: `python -m tools.hunyuan_mini --work build/hunyuan-mini`.

Each stage is a command of its own (`python -m tools.hunyuan_mini.vae --help`), keeps its checkpoint and its log in the
work folder, and goes on from there when it was killed.
"""

from tools.flux_mini.export import write_pipeline
from tools.flux_mini.training import recipe_options, run_stages

from .card import write_card
from .export import build_pipeline
from .recipe import STAGES


def main() -> None:
    options = recipe_options(__doc__, "assets/hunyuan-mini")
    run_stages("tools.hunyuan_mini", STAGES, options)
    write_pipeline(build_pipeline(options.work, "distilled.pt"), options.folder)
    write_card(options.work, options.folder)


if __name__ == "__main__":
    main()
