"""MagCache's ratios: diffusers' own calibration, averaged over prompts, in a file that the method reads."""

import pytest
import yaml
from tiny import TEXT_TOKENS

from h2cache.eval.generation.backends import diffusers_cache
from h2cache.eval.models.pipelines import ModelConfig
from tools.magcache_ratios import magnitude_ratios, render


@pytest.fixture
def model(tiny_pipe_folder) -> ModelConfig:
    sizes = dict(height=64, width=64, num_inference_steps=6, guidance_scale=3.5, max_sequence_length=TEXT_TOKENS)
    return ModelConfig(str(tiny_pipe_folder), None, "float32", "cpu", "none", **sizes)


def test_ratios_are_one_a_step_and_the_mean_over_prompts(tiny_pipe, model):
    one, other, both = (magnitude_ratios(tiny_pipe, prompts, model) for prompts in (["a"], ["a"], ["a", "b"]))
    assert len(one) == 6 and one[0] == 1.0 and one == other and all(0.2 < ratio < 5 for ratio in one)
    assert both != one and not tiny_pipe.transformer.is_cache_enabled


def test_the_file_is_what_the_method_reads(tmp_path):
    ratios = [1.0, 0.98765, 1.00001]
    written = yaml.safe_load(render("m", 2, "a machine", ratios))
    assert written == {"num_inference_steps": 3, "mag_ratios": ratios}
    assert diffusers_cache("MagCacheConfig", **written).identity()["fields"]["mag_ratios"] == tuple(ratios)
