"""VBench (arXiv 2311.17982) by its own package: the dimensions that it takes of any video, `vbench_motion_smoothness`
and so on. The package was not run where this was written: tests hold the call against its documented interface.
"""

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from h2cache.eval.generation.videos import frames_of, write_mp4
from h2cache.eval.metrics.metric import Means, Metric, Scorer, Shown
from h2cache.eval.metrics.weights import loaded

# What the package serves for videos of any prompt (its README, "mode=custom_input").
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
FPS = 8  # of the file that it reads; only dynamic_degree looks at it
NAME = "video"


def _load(dimension: str, means: Means) -> Scorer:
    package = loaded(f"vbench_{dimension}", (), means.online, partial(import_module, "vbench"))

    def scored(shown: Shown) -> float:
        with TemporaryDirectory() as folder:
            video, results = Path(folder, f"{NAME}.mp4"), Path(folder, "results")
            write_mp4(frames_of(shown.image), FPS, video)
            # Its list of prompts, which it does not open for videos of one's own.
            prompts = Path(package.__file__).with_name("VBench_full_info.json")

            def evaluate() -> float:
                judge = package.VBench(means.device, str(prompts), str(results))
                judge.evaluate(videos_path=str(video), name=NAME, dimension_list=[dimension], mode="custom_input")
                found = json.loads((results / f"{NAME}_eval_results.json").read_text(encoding="utf-8"))
                return float(found[dimension][0])  # over all videos, of which there is one

            # Weights are fetched, and fail to be, when it evaluates.
            return loaded(f"vbench_{dimension}", (), means.online, evaluate)

    return scored


def _metric(dimension: str) -> Metric:
    load: Callable[[Means], Scorer] = partial(_load, dimension)
    return Metric(f"VBench {dimension.replace('_', ' ')}", load, fetches=True, of_images=False, of_videos=True)


VBENCH = {f"vbench_{dimension}": _metric(dimension) for dimension in DIMENSIONS}
