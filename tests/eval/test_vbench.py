"""VBench's dimensions, with a stand-in for its package that takes what the real one documents and nothing else."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from PIL import Image

from h2cache.eval.generation.videos import filmstrip
from h2cache.eval.metrics.registry import Metrics, kind
from h2cache.eval.metrics.vbench import DIMENSIONS


class VBench:
    """Scores a video by how bright it is, a fifth of it for each letter s in the dimension's name."""

    def __init__(self, device, full_info_dir, output_path):
        assert isinstance(device, torch.device) and full_info_dir.endswith("VBench_full_info.json")
        self.output_path = Path(output_path)
        self.output_path.mkdir(exist_ok=True)

    def evaluate(
        self,
        videos_path,
        name,
        prompt_list=(),
        dimension_list=None,
        local=False,
        read_frame=False,
        mode="vbench_standard",
    ):
        assert mode == "custom_input" and set(dimension_list) <= set(DIMENSIONS)
        with av.open(videos_path) as video:
            pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
        results = {}
        for dimension in dimension_list:
            score = float(pixels.mean()) / 255 * dimension.count("s") / 5
            results[dimension] = [score, [{"video_path": videos_path, "video_results": score}]]
        (self.output_path / f"{name}_eval_results.json").write_text(json.dumps(results))


@pytest.fixture
def package(monkeypatch, tmp_path):
    module = ModuleType("vbench")
    module.__file__, module.VBench = str(tmp_path / "vbench/__init__.py"), VBench
    monkeypatch.setitem(sys.modules, "vbench", module)
    return module


@pytest.fixture
def strip() -> Image.Image:
    frames = [np.full((32, 48, 3), 40 + 20 * k, np.uint8) for k in range(5)]
    return filmstrip([Image.fromarray(frame) for frame in frames])


def test_each_dimension_is_read_from_the_package_s_results(package, strip):
    names = [f"vbench_{dimension}" for dimension in DIMENSIONS]
    metrics = Metrics(names)
    assert not metrics.unavailable
    for name in names:
        expected = 80 / 255 * name.removeprefix("vbench_").count("s") / 5
        assert metrics.score(name, strip, None, "a prompt", None) == pytest.approx(expected, abs=0.01)
        assert kind(name).of_videos and not kind(name).of_images and not kind(name).needs_reference


def test_without_the_package_there_is_one_sentence(monkeypatch, strip):
    monkeypatch.setitem(sys.modules, "vbench", None)
    metrics = Metrics(["vbench_motion_smoothness"])
    assert "a package is missing" in metrics.unavailable["vbench_motion_smoothness"]
    assert math.isnan(metrics.score("vbench_motion_smoothness", strip, None, "", None))


def test_weights_that_are_missing_are_one_sentence_and_never_a_zero(package, monkeypatch, strip):
    def evaluate(self, **arguments):
        raise FileNotFoundError("no amt-s.pth\nand more")

    monkeypatch.setattr(VBench, "evaluate", evaluate)
    metrics = Metrics(["vbench_motion_smoothness"])
    assert math.isnan(metrics.score("vbench_motion_smoothness", strip, None, "", None))
    assert metrics.unavailable == {"vbench_motion_smoothness": "its weights cannot be loaded (no amt-s.pth)"}
