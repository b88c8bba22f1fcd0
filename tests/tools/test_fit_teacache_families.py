"""tools/fit_teacache.py on every model family: what it sees of a run, and what it writes for two transformers."""
# ruff: noqa: F811 - fixtures

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel
from families import FAMILIES
from families.base import Family, family_pipe, generate
from loops import denoise, denoising
from nunchakus import flux, nunchaku, standin  # noqa: F401
from repository import REPOSITORY
from torch import Tensor, nn

import h2cache
from h2cache.adapters import transformers_of
from h2cache.adapters.flux import FluxAdapter
from h2cache.baselines import TeaCacheConfig
from h2cache.eval.errors import UserError
from h2cache.eval.models.pipelines import ModelConfig
from h2cache.runtime.interception import interception_of
from tools import fit_teacache

BY_NAME = {family.name: family for family in FAMILIES}
STEPS = 6


def part(index: int | None) -> Callable[[Any], Tensor]:
    """The image tokens in what the last block returns: its only output, or one of two."""
    return lambda output: output if index is None else output[index]


@dataclass(frozen=True)
class Facts:
    """Where the model's own source has what is measured, apart from any adapter."""

    family: str
    first_list: str
    last_list: str
    attention: str  # of the first block: it takes the modulated input
    image: Callable[[Any], Tensor]  # of what the last block returns


FACTS = [
    Facts("qwen-image", "transformer_blocks", "transformer_blocks", "attn", part(1)),
    Facts("sd3", "transformer_blocks", "transformer_blocks", "attn", part(1)),
    Facts("wan", "blocks", "blocks", "attn1", part(None)),
    Facts("wan-a14b", "blocks", "blocks", "attn1", part(None)),
    Facts("hunyuan-video", "transformer_blocks", "single_transformer_blocks", "attn", part(0)),
    Facts(
        "chroma", "transformer_blocks", "single_transformer_blocks", "attn", lambda output: output[:, 7:]
    ),  # 7 of text
]


@contextmanager
def plain_hooks(transformer: nn.Module, facts: Facts) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields a list to which each call adds (modulated input, what all blocks add to the image tokens)."""
    seen: list[tuple[Tensor, Tensor]] = []
    latest: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        latest[name] = (args[0] if args else kwargs["hidden_states"]).clone()

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((latest["modulated"], facts.image(output) - latest["entered"]))

    first, last = getattr(transformer, facts.first_list)[0], getattr(transformer, facts.last_list)[-1]
    hooks = [
        first.register_forward_pre_hook(partial(note, "entered"), with_kwargs=True),
        getattr(first, facts.attention).register_forward_pre_hook(partial(note, "modulated"), with_kwargs=True),
        last.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def expected_changes(seen: list[tuple[Tensor, Tensor]], calls_per_step: int) -> list[list[list[float]]]:
    """By branch, call after call and sample after sample, the relative L1 changes between its steps."""
    branches = []
    for call in range(calls_per_step):
        of_branch = seen[call::calls_per_step]
        for sample in range(len(of_branch[0][0])):
            pairs = pairwise([(modulated[sample], residual[sample]) for modulated, residual in of_branch])
            branches.append([[change(a, b) for a, b in zip(before, now, strict=True)] for before, now in pairs])
    return branches


def change(before: Tensor, now: Tensor) -> float:
    return ((now - before).abs().mean() / before.abs().mean()).item()


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: facts.family)
def test_the_changes_are_those_that_plain_hooks_see(facts: Facts, guided: bool):
    """In each branch of guidance, two calls or a doubled batch, and in each of two transformers."""
    family, pipe = BY_NAME[facts.family], family_pipe(facts.family)
    with ExitStack() as stack:
        seen = [stack.enter_context(plain_hooks(transformer, facts)) for transformer in transformers_of(pipe)]
        generate(family, pipe, guided=guided, steps=STEPS)
    with ExitStack() as stack:
        recordings = [stack.enter_context(fit_teacache.recorded(transformer)) for transformer in transformers_of(pipe)]
        generate(family, pipe, guided=guided, steps=STEPS)

    calls = family.guided_calls if guided else 1
    assert len(seen[0]) == calls * STEPS // len(seen)
    for of_transformer, recording in zip(seen, recordings, strict=True):
        expected = expected_changes(of_transformer, calls)
        assert len(expected) == 1 + guided
        np.testing.assert_allclose(list(recording.values()), expected, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_family_is_recorded_and_left_as_it_was(family: Family):
    """One number of pairs in each branch, all of them finite, while the result is that of the untouched pipeline."""
    pipe = family_pipe(family.name)
    plain = generate(family, pipe, guided=True)
    with ExitStack() as stack:
        recordings = [stack.enter_context(fit_teacache.recorded(transformer)) for transformer in transformers_of(pipe)]
        assert torch.equal(generate(family, pipe, guided=True), plain)
    for transformer, recording in zip(transformers_of(pipe), recordings, strict=True):
        x, y = fit_teacache.stacked([recording])
        assert x.shape == y.shape == (1, 2 if family.guided_calls else 1, family.steps // len(recordings) - 1)
        assert np.isfinite([x, y]).all() and (x > 0).all() and (y > 0).all()
        assert interception_of(transformer) is None
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())


@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_nunchaku_s_flux_is_recorded_as_what_it_stands_for(nunchaku, generation: str):
    """Also where one C++ core hides the blocks. The stand-ins compute in bfloat16 what diffusers' blocks do."""
    plain = flux()
    changes = []
    for transformer in (plain, standin(nunchaku, generation, plain).transformer):
        with fit_teacache.recorded(transformer) as recording:
            denoise(transformer, steps=STEPS, dtype=torch.bfloat16)
        changes.append(list(recording.values()))
    assert np.shape(changes[0]) == (1, STEPS - 1, 2)
    np.testing.assert_allclose(*changes, rtol=1e-2)


class Prompted:
    """A tiny pipeline that takes a prompt: what would be its embeddings are random, seeded with the prompt."""

    def __init__(self, family: Family, guided: bool):
        self.family, self.guided, self.calls = family, guided, 0
        pipe = family_pipe(family.name)
        self.transformer, self.transformer_2 = pipe.transformer, getattr(pipe, "transformer_2", None)

    def __call__(self, prompt: str, generator: torch.Generator, output_type: str, num_inference_steps: int) -> None:
        assert output_type == "latent"
        self.calls += 1
        given = self.family.inputs([sum(prompt.encode())], self.guided)
        pipe = family_pipe(self.family.name)
        pipe(**given, generator=generator, output_type=output_type, num_inference_steps=num_inference_steps)


@dataclass(frozen=True)
class TinyModel(ModelConfig):
    """The pipeline of a family in the place of one that is loaded."""

    pipe: Any = None

    def check(self) -> None:
        pass

    def load(self, on_bytes: Any) -> Any:
        return self.pipe


@pytest.fixture
def settings(tmp_path) -> Callable[..., fit_teacache.Settings]:
    """Three prompts for a pipeline, of eight steps if nothing else is said."""
    fields = yaml.safe_load((REPOSITORY / "configs/model/flux-mini.yaml").read_text())
    del fields["_target_"]

    def settings_of(pipe: Any, steps: int = 8) -> fit_teacache.Settings:
        model = TinyModel(**fields | {"device": "cpu", "num_inference_steps": steps}, pipe=pipe)
        return fit_teacache.Settings(model, 3, None, 2, 0, tmp_path / "tiny.yaml")

    return settings_of


@pytest.mark.parametrize("name", ["qwen-image", "sd3", "wan"])
def test_what_is_written_is_what_teacache_takes(settings, name: str):
    pipe = Prompted(BY_NAME[name], guided=True)
    made = settings(pipe)
    text = fit_teacache.run(made, "tiny", "the command")
    assert pipe.calls == 3
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert "42 pairs" in comment, "3 prompts, 2 branches, 7 changes"
    assert "8 steps each, 2 branches of guidance, cpu" in comment
    config = TeaCacheConfig(**yaml.safe_load(made.out.read_text()))
    with h2cache.apply(family_pipe(name), config) as handle:  # which the default polynomial is refused by
        generate(BY_NAME[name], family_pipe(name), guided=True, steps=8)
    assert 0.3 < handle.summary()["computed_fraction"] < 1


def test_arguments_that_the_pipeline_does_not_take_are_left_out(settings):
    """`Prompted` takes the number of steps alone; the model's configuration has sizes and scales as well."""
    made = settings(Prompted(BY_NAME["wan"], guided=False))
    assert len(made.model.call_arguments) > 1
    fit_teacache.run(made, "tiny", "the command")


def test_without_guidance_there_is_one_branch(settings):
    text = fit_teacache.run(settings(Prompted(BY_NAME["wan"], guided=False)), "tiny", "the command")
    assert "21 pairs" in text
    assert "branches" not in text


def test_each_of_two_transformers_has_a_polynomial_and_a_file_of_its_own(settings, tmp_path):
    pipe = Prompted(BY_NAME["wan-a14b"], guided=True)
    made = settings(pipe, steps=12)
    text = fit_teacache.run(made, "tiny", "the command")
    files = [tmp_path / "tiny.yaml", tmp_path / "tiny-transformer_2.yaml"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert text == "".join(file.read_text() for file in files)
    assert "polynomial of tiny," in files[0].read_text() and "of tiny, transformer_2," in files[1].read_text()

    prompts = fit_teacache.calibration_prompts(None, 3, 0)
    fitted = fit_teacache.calibrate(pipe, prompts, 0, {"num_inference_steps": 12})
    for file, (x, y) in zip(files, fitted, strict=True):
        written = tuple(yaml.safe_load(file.read_text())["coefficients"])
        assert written == fit_teacache.fit_polynomial(x, y, 2).coefficients
    assert files[0].read_text().partition("threshold:")[2] != files[1].read_text().partition("threshold:")[2]


def test_a_second_file_that_cannot_be_written_is_found_out_before_anything_is_drawn(settings, tmp_path):
    pipe = Prompted(BY_NAME["wan-a14b"], guided=False)
    (tmp_path / "tiny-transformer_2.yaml").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        fit_teacache.run(settings(pipe), "tiny", "the command")
    assert pipe.calls == 0


def test_one_branch_counts_as_much_as_another():
    """Held-out error over branches is that of all their pairs, and a prompt is held out with all of its branches."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.02, 0.08, (6, 2, 10))
    y = 2 * x + rng.normal(0, 1e-3, x.shape) + rng.normal(0, 1e-3, (6, 1, 1))
    flat = fit_teacache.fit_polynomial(x.reshape(6, 20), y.reshape(6, 20), 3)
    assert fit_teacache.fit_polynomial(x, y, 3) == flat


def test_a_threshold_is_simulated_run_by_run():
    x = np.random.default_rng(0).uniform(0.02, 0.08, (3, 2, 19))
    flat = fit_teacache.choose_thresholds(x.reshape(6, 19), (2.0, 0.0))
    assert fit_teacache.choose_thresholds(x, (2.0, 0.0)) == flat


def test_the_branch_of_a_change_that_is_not_finite_does_not_hide_its_prompt_and_step():
    x = np.random.default_rng(0).uniform(0.02, 0.08, (3, 2, 9))
    x[2, 1, 4] = math.nan
    with pytest.raises(UserError, match="prompt 2, steps 4 to 5: the change of the input is nan"):
        fit_teacache.fit_polynomial(x, x, 2)


def test_a_step_that_is_not_finite_is_seen_as_such(transformer: FluxTransformer2DModel):
    """From the step on at which the latents are NaN; the engine compares nothing after it."""

    def spoil(step: int, call: dict[str, Any]) -> None:
        if step == 2:
            call["hidden_states"] = call["hidden_states"] * math.nan

    with fit_teacache.recorded(transformer) as recording:
        list(denoising(transformer, steps=5, before_step=spoil))
    (changes,) = recording.values()
    assert np.isfinite(changes).tolist() == [[True, True], [False, False], [False, False], [False, False]]


@pytest.mark.parametrize(
    ("recordings", "seen"),
    [
        ([{"a": [(1, 1)] * 3, "b": [(1, 1)] * 2}], "3, 4 steps"),  # guidance ended early
        ([{"a": [(1, 1)] * 3}, {"a": [(1, 1)] * 5}], "4, 6 steps"),
        ([{"a": [(1, 1)] * 3}, {"a": [(1, 1)] * 3, "b": [(1, 1)] * 3}], "4 steps"),
        ([{"a": []}, {}], "less than 2 steps"),  # a second transformer that has one step, or none
    ],
)
def test_runs_of_different_lengths_are_refused(recordings: list[dict], seen: str):
    with pytest.raises(UserError, match=f"a transformer was called for {seen}: a fit needs the same number"):
        fit_teacache.stacked(recordings)


def test_a_run_of_one_step_is_left_out():
    """As of a pipeline whose first call has another shape."""
    x, y = fit_teacache.stacked([{"first": [], "a": [(1, 2), (3, 4)]}])
    assert x.tolist() == [[[1, 3]]] and y.tolist() == [[[2, 4]]]


class Parts:
    """A pipeline that is never called."""

    def __call__(self, prompt: str) -> None:
        raise AssertionError


class Classes(Parts):
    """A pipeline that is told a class instead of a prompt, as DiT's."""

    def __call__(self, class_labels: list[int]) -> None:
        raise AssertionError


@pytest.mark.parametrize("reason", ["no adapter", "no probe", "no prompt"])
def test_a_model_that_cannot_be_calibrated_is_one_sentence_before_anything_is_drawn(
    settings, transformer: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch, reason: str
):
    pipe = Classes() if reason == "no prompt" else Parts()
    if reason == "no adapter":
        pipe.unet = nn.Linear(1, 1)
        says = "fewer steps of a better solver"
    elif reason == "no prompt":
        pipe.transformer = transformer
        says = "a Classes takes no prompt"
    else:
        unwatched = type("Unwatched", (FluxAdapter,), {"family": "Unwatched", "modulated": None})
        monkeypatch.setattr("h2cache.adapters.Registry.added", (unwatched,))
        pipe.transformer = transformer
        says = "use H2CacheConfig or BlockCacheConfig"
    with pytest.raises(UserError, match=f"model=tiny: .*{says}"):
        fit_teacache.run(settings(pipe), "tiny", "the command")
    assert interception_of(transformer) is None
