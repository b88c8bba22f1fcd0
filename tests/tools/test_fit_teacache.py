"""tools/fit_teacache.py: what it measures, which polynomial it chooses, and the file that `method=teacache` reads."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from loops import denoising
from repository import REPOSITORY
from torch import Tensor

from h2cache.baselines import TeaCacheConfig
from h2cache.eval.cli import arguments as commandline
from h2cache.eval.errors import UserError
from h2cache.eval.models.pipelines import ModelConfig
from tools import fit_teacache
from tools.calibration_prompts import UNTRAINED_CLIPS, UNTRAINED_PHRASINGS, calibration_prompts, scene_prompts
from tools.flux_mini.scenes import HELD_OUT_PHRASINGS, HELD_OUT_WORDS, PHRASINGS

CUBIC = (500.0, -30.0, 1.5, 0.02)  # highest power first
FITTED, MODELS = (
    sorted(file.stem for file in (REPOSITORY / "configs" / group).iterdir()) for group in ("teacache", "model")
)


def changes(prompts: int = 6, steps: int = 30, seed: int = 0) -> np.ndarray:
    """Relative L1 changes as a model might show them, (prompts, steps - 1)."""
    return np.random.default_rng(seed).uniform(0.02, 0.08, (prompts, steps - 1))


def noise(shape: tuple[int, ...], size: float) -> np.ndarray:
    return np.random.default_rng(1).normal(0, size, shape)


def by_hand(transformer: torch.nn.Module, call: dict) -> tuple[Tensor, Tensor]:
    """(modulated input of the first block, what all blocks add to the image tokens), written out from the equations."""
    with torch.no_grad():
        image = transformer.x_embedder(call["hidden_states"])
        text = transformer.context_embedder(call["encoder_hidden_states"])
        times = 1000 * call["timestep"], 1000 * call["guidance"]
        temb = transformer.time_text_embed(*times, call["pooled_projections"])
        rotary = transformer.pos_embed(torch.cat([call["txt_ids"], call["img_ids"]]))
        shift, scale, *_ = transformer.transformer_blocks[0].norm1.linear(F.silu(temb)).chunk(6, dim=1)
        modulated = F.layer_norm(image, image.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        entered = image
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            text, image = block(image, text, temb, image_rotary_emb=rotary)
    return modulated, image - entered


def test_the_changes_are_those_of_an_independent_loop(transformer):
    seen = []
    with fit_teacache.recorded(transformer) as recording:
        for _ in denoising(transformer, steps=6, before_step=lambda step, call: seen.append(dict(call))):
            pass
    (trace,) = recording.values()
    assert not any(module._forward_hooks for module in transformer.modules())

    features = [by_hand(transformer, call) for call in seen]
    expected = []
    for before, now in pairwise(features):
        expected.append([((a - b).abs().mean() / a.abs().mean()).item() for a, b in zip(before, now, strict=True)])
    assert len(trace) == 5
    np.testing.assert_allclose(trace, expected, rtol=1e-5)


def test_runs_do_not_see_each_other(transformer):
    traces = []
    for seed in (0, 1, 0):
        with fit_teacache.recorded(transformer) as trace:
            list(denoising(transformer, steps=4, seed=seed))
        traces.append(trace)
    assert traces[0] == traces[2] != traces[1]
    with pytest.raises(KeyboardInterrupt), fit_teacache.recorded(transformer):
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in transformer.modules())


def test_a_known_polynomial_is_recovered():
    x = changes()
    np.testing.assert_allclose(fit_teacache.least_squares(x, np.polyval(CUBIC, x), 3), CUBIC, rtol=1e-7)
    y = np.polyval(CUBIC, x) + noise(x.shape, 1e-3)
    np.testing.assert_allclose(fit_teacache.least_squares(x, y, 4), np.polyfit(x.ravel(), y.ravel(), 4), rtol=1e-5)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_degree_is_that_of_the_data(degree):
    x = changes(prompts=12)
    y = np.polyval(CUBIC[3 - degree :], x) + noise(x.shape, 5e-4)
    fit = fit_teacache.fit_polynomial(x, y, max_degree=6)
    assert len(fit.coefficients) == degree + 1
    assert fit.coefficients == fit_teacache.least_squares(x, y, degree)
    assert all(error > 1.5 * fit.errors[degree - 1] for error in fit.errors[: degree - 1])


def test_whole_prompts_are_held_out():
    """Each prompt has a level of its own, and its changes lie together: high degrees follow the prompts that they saw.

    Single steps held out would leave their neighbours in, and the highest degree would look best.
    """
    x = np.linspace(0.02, 0.08, 12)[:, None] + noise((12, 20), 5e-4)
    y = x + np.tile([0.01, -0.01], 6)[:, None]
    fit = fit_teacache.fit_polynomial(x, y, max_degree=5)
    assert len(fit.coefficients) == 2

    def root_mean_square(degree: int, held_out: bool) -> float:
        wrong = []
        for i in range(12):
            others = np.arange(12) != i if held_out else np.full(12, True)
            wrong.append(np.polyval(np.polyfit(x[others].ravel(), y[others].ravel(), degree), x[i]) - y[i])
        return np.sqrt(np.mean(np.square(wrong)))

    assert root_mean_square(5, held_out=False) < root_mean_square(1, held_out=False)
    np.testing.assert_allclose(fit.errors, [root_mean_square(d, held_out=True) for d in range(1, 6)], rtol=1e-4)


@pytest.mark.parametrize(("excess", "degree"), [((3, -1, 3, -1), 1), ((2, 0, 2, 0), 2), ((1, 1, 1, 1), 2)])
def test_of_degrees_that_cannot_be_told_apart_the_lowest(monkeypatch, excess, degree):
    """All three excesses have mean 1; their standard errors are 1.15, 0.58 and 0. Degree 2 is the best, 3 is worse."""
    best = np.array([5.0, 6.0, 7.0, 8.0])
    squares = {1: best + excess, 2: best, 3: best + 1}
    monkeypatch.setattr(fit_teacache, "held_out_squares", lambda x, y, degree: squares[degree])
    fit = fit_teacache.fit_polynomial(changes(prompts=4), changes(prompts=4), max_degree=3)
    assert len(fit.coefficients) == degree + 1
    assert fit.errors == pytest.approx([7.5**0.5, 6.5**0.5, 7.5**0.5])


@pytest.mark.parametrize("which", ["input", "residual"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_change_that_is_not_finite_is_refused(which, value):
    pairs = {"input": changes(), "residual": changes(seed=1)}
    pairs[which][2, 7] = value
    with pytest.raises(UserError, match=f"prompt 2, steps 7 to 8: the change of the {which} is {value}"):
        fit_teacache.fit_polynomial(*pairs.values(), max_degree=3)


def test_changes_too_few_for_the_degree_are_refused():
    x = np.tile([0.1, 0.2, 0.3, 0.4], (5, 1))
    with pytest.raises(UserError, match="max_degree=3 is too high for 4"):
        fit_teacache.fit_polynomial(x, x, max_degree=3)


def test_the_accumulator_is_teacache_s():
    """Six steps: 0 and 5 always; 1 is skipped at a sum of 1, 2 computed at 2, 3 skipped at 1, 4 computed at 2."""
    assert fit_teacache.computed_steps([1.0, 1.0, 1.0, 1.0, 9.0], threshold=2.0) == 4
    assert fit_teacache.computed_steps([1.0, 1.0, 1.0, 1.0, 9.0], threshold=4.5) == 2
    assert fit_teacache.computed_steps([1.0, 1.0, 1.0, 1.0, 0.0], threshold=1.0) == 6


def test_thresholds_have_two_digits_and_reach_their_speedup():
    chosen = fit_teacache.choose_thresholds(changes(steps=50), (2.0, 0.0))
    assert list(chosen) == [1.5, 2.0, 3.0]
    for wanted, (threshold, reached) in chosen.items():
        assert float(f"{threshold:.1e}") == pytest.approx(threshold)
        assert reached == pytest.approx(wanted, rel=0.05)


def test_where_the_polynomial_is_positive():
    x = np.array([[0.2, 0.3, 0.5]])
    assert fit_teacache.positive_range(x, (1.0, 0.0)) == (0.0, 1.0, 1.0)
    assert fit_teacache.positive_range(x, (-1.0, 0.9, -0.08)) == pytest.approx((0.1, 0.8, 1.0), abs=1e-3)  # its roots


def test_nobody_is_calibrated_on_what_is_evaluated():
    prompts = scene_prompts(64, seed=0) + scene_prompts(64, 0, UNTRAINED_PHRASINGS)
    assert scene_prompts(64, seed=0) == scene_prompts(64, seed=0) != scene_prompts(64, seed=1)
    assert set(UNTRAINED_PHRASINGS).isdisjoint(PHRASINGS + HELD_OUT_PHRASINGS)
    marks = (", lettered ", "picture ", " spelling ", '": ')  # one of each untrained phrasing, of no other
    assert [any(mark in prompt for mark in marks) for prompt in prompts] == [False] * 64 + [False, True] * 32
    evaluated = {json.loads(line)["prompt"] for line in (REPOSITORY / "assets/prompts/signs80.jsonl").open()}
    assert evaluated.isdisjoint(prompts)
    assert not [word for word in HELD_OUT_WORDS if any(f'"{word}"' in prompt for prompt in prompts)]


def test_hunyuan_mini_is_calibrated_on_its_own_clips():
    from tools.hunyuan_mini import clips

    plain, mixed = (calibration_prompts(None, 64, 0, "hunyuan-mini", untrained) for untrained in (False, True))
    assert plain == calibration_prompts(None, 64, 0, "hunyuan-mini") and len(set(plain)) == 64
    assert set(UNTRAINED_CLIPS).isdisjoint(clips.PHRASINGS + clips.HELD_OUT_PHRASINGS)
    assert any(" before " in prompt or " where " in prompt for prompt in mixed[1::2])
    assert not any(" before " in prompt or " where " in prompt for prompt in mixed[::2])


@pytest.fixture
def settings(tiny_pipe_folder, tmp_path):
    """Three prompts of eight steps with the tiny pipeline."""
    fields = yaml.safe_load((REPOSITORY / "configs/model/flux-mini.yaml").read_text())
    fields |= {"path": str(tiny_pipe_folder), "device": "cpu", "height": 32, "width": 32, "num_inference_steps": 8}
    del fields["_target_"]
    return fit_teacache.Settings(ModelConfig(**fields), 3, None, 2, 0, tmp_path / "tiny.yaml")


def test_the_file_says_how_it_was_made_and_is_what_teacache_takes(settings):
    text = fit_teacache.run(settings, "tiny", "the command")
    assert settings.out.read_text() == text
    assert [file.name for file in settings.out.parent.iterdir()] == ["tiny.yaml"]
    assert max(map(len, text.splitlines())) <= 120
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    parts = (
        "tiny",
        "the command",
        "21 pairs",
        "3 prompts (captions, seed 0), 8 steps each",
        "1: 0.",
        "2: 0.",
    )
    assert [part for part in parts if part not in comment] == []

    written = yaml.safe_load(text)
    config = TeaCacheConfig(**written)
    assert config.threshold > 0 and 2 <= len(config.coefficients) <= 3
    assert all(isinstance(c, float) for c in written["coefficients"])
    assert fit_teacache.run(settings, "tiny", "the command") == text  # the same weights, the same file


def test_coefficients_of_any_size_are_read_back():
    """YAML takes 1e-05 for a string; a point and nine digits keep it a number."""
    fit = fit_teacache.Fit((-5.70654305e22, 1e-05, 0.0, 1.23456789), (0.1,))
    text = fit_teacache.render("tiny", "the command", "by hand", changes(), changes(seed=1), fit)
    assert tuple(yaml.safe_load(text)["coefficients"]) == fit.coefficients


def test_prompts_may_come_from_a_file(settings, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog\na bird\na fish\n")
    text = fit_teacache.run(dataclasses.replace(settings, prompts_file=file), "tiny", "the command")
    assert "3 prompts (prompts.txt)" in text.replace("\n# ", " ")
    with pytest.raises(UserError, match="has 4 prompts, one a line, and 5 are needed"):
        fit_teacache.run(dataclasses.replace(settings, prompts_file=file, images=5), "tiny", "the command")
    with pytest.raises(UserError, match="No such file"):
        fit_teacache.run(dataclasses.replace(settings, prompts_file=tmp_path / "none.txt"), "tiny", "the command")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["images=1"], "images=1 is not allowed: it must be a whole number from 2"),
        (["max_degree=0"], "max_degree=0 is not allowed"),
        (["seed=red"], "seed=red is not allowed"),
        (["model.num_inference_steps=2"], "num_inference_steps=2 is not allowed"),
        (["images=2", "model.num_inference_steps=4"], "max_degree=6 is too high"),
        (["model.height=65"], "model=flux-mini: height=65"),
        (["model.path=nowhere"], "model.path=nowhere: no pipeline there"),
        (["out=no/such/folder.yaml"], "no folder no/such"),
    ],
)
def test_what_the_user_can_put_right_is_one_sentence(monkeypatch, arguments, says):
    monkeypatch.setattr("sys.argv", ["fit_teacache", *arguments])
    with pytest.raises(SystemExit) as exit:
        fit_teacache.main()
    assert exit.value.code.startswith("fit_teacache: error: ")
    assert says in exit.value.code


@pytest.mark.parametrize("model", sorted({*FITTED} & {*MODELS}))
def test_the_method_takes_the_polynomial_of_the_model(model):
    """`run.py method=teacache model=...`; what is given by hand wins. FLUX.1's is the published one."""

    def composed(*overrides: str) -> TeaCacheConfig:
        return instantiate(compose("run", overrides=list(overrides)).method, _convert_="all")

    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        config = composed("method=teacache", f"model={model}")
        assert config == composed(f"model={model}", "method=teacache")
        assert config.updated(threshold=0.5) == composed("method=teacache", f"model={model}", "method.threshold=0.5")
    if "flux1" in model:
        assert config == TeaCacheConfig()
    else:
        written = {"defaults": [model]}
        while "defaults" in written:  # one model may have another's
            written = yaml.safe_load((REPOSITORY / f"configs/teacache/{written['defaults'][0]}.yaml").read_text())
        assert config == TeaCacheConfig(written["threshold"], tuple(written["coefficients"]))


def test_every_polynomial_is_that_of_a_model():
    """A second transformer's file is named after its model."""
    assert {name.removesuffix("-transformer_2") for name in FITTED} <= set(MODELS)


@pytest.mark.parametrize("model", sorted({*MODELS} - {*FITTED}))
def test_a_model_without_a_polynomial_is_told_how_to_get_one(model):
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        with pytest.raises(MissingConfigException) as error:
            compose("run", overrides=["method=teacache", f"model={model}"])
    assert commandline.explain(error.value, "run.py", "") == (
        f"model={model} has no TeaCache polynomial: fit one with `python -m tools.fit_teacache model={model}`, or "
        "choose another method, such as method=h2cache"
    )
