"""Searches for the steps that a model had best compute: `python -m tools.calibrate model=flux-mini budget=4`.

The command line is eval/cli/calibrate.py, which `h2cache calibrate` is too. Without a prompts_file this one draws
captions of what an embedded model shows, half of them in phrasings that it never saw.
"""

from functools import partial

from h2cache.eval.cli.calibrate import main
from tools.calibration_prompts import calibration_prompts

if __name__ == "__main__":
    main(prompts=partial(calibration_prompts, untrained=True))
