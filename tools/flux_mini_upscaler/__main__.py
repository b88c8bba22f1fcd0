"""All of flux-mini-upscaler with one command: `python -m tools.flux_mini_upscaler --work build/flux-mini-upscaler`.

The training (`python -m tools.flux_mini_upscaler.train --help`) keeps its checkpoint, its log and its encoded scenes in
the work folder, and goes on from there when it was killed. It needs nothing but assets/flux-mini.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from .card import write_card
from .export import export
from .recipe import TRAINING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--folder", type=Path, default=Path("assets/flux-mini-upscaler"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of the training: cpu or cuda")
    options = parser.parse_args()
    arguments = [text for name, value in TRAINING.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tools.flux_mini_upscaler.train", "--work", str(options.work), *arguments]
    subprocess.run([*command, "--threads", str(options.threads), "--device", options.device], check=True)
    export(options.work, options.folder)
    write_card(options.work, options.folder)


if __name__ == "__main__":
    main()
