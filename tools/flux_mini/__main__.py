"""All of flux-mini with one command: `python -m tools.flux_mini --work build/flux-mini`.

Each stage is a command of its own (`python -m tools.flux_mini.vae --help`), keeps its checkpoint and its log in the
work folder, and goes on from there when it was killed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from .card import write_card
from .export import export
from .recipe import STAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--folder", type=Path, default=Path("assets/flux-mini"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of the training stages: cpu or cuda")
    options = parser.parse_args()
    for stage, settings in STAGES:
        arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", f"tools.flux_mini.{stage}", "--work", str(options.work), *arguments]
        subprocess.run([*command, "--threads", str(options.threads), "--device", options.device], check=True)
    export(options.work, "distilled.pt", options.folder)
    write_card(options.work, options.folder)


if __name__ == "__main__":
    main()
