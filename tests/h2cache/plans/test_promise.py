"""The promise: the exact binomial, the sequence of tests, and that the promise is kept as often as it says."""

import random

import pytest
import torch

import h2cache
from h2cache.plans.promise import Promise, allowed_failures, certified, decibels, promisable


def test_the_exact_binomial():
    """0.95 ** 45 = 0.0994 and 0.95 ** 44 = 0.1047; with one failure 77 prompts are needed, as tables say."""
    assert [allowed_failures(n, 0.95, 0.9) for n in (44, 45, 76, 77)] == [-1, 0, 0, 1]
    assert h2cache.AtLeast(psnr=40).prompts_needed == 45
    assert h2cache.AtLeast(psnr=40, fraction=0.9, confidence=0.99).prompts_needed == 44


def test_the_last_plan_before_the_first_failure_is_taken():
    asked = h2cache.AtLeast(psnr=40, fraction=0.9, confidence=0.9)  # of 30 prompts none may fail
    good, bad = [41.0] * 30, [41.0] * 29 + [39.0]
    assert certified(asked, [good, good, bad, good]) == 1
    assert certified(asked, [bad, good]) is None
    assert certified(asked, [[float("nan")] * 30]) is None
    assert promisable(bad, 0.9, 0.9) == 39.0
    assert promisable([float(i) for i in range(77)], 0.95, 0.9) == 1.0  # one of 77 may be below
    assert promisable([1.0] * 44, 0.95, 0.9) is None


def test_it_is_kept_as_often_as_it_says():
    """Plans that become worse; the truth is known, and a certified plan misses it in at most one draw of ten."""
    draw, asked = random.Random(0), h2cache.AtLeast(psnr=40, fraction=0.9, confidence=0.9)
    chances = (0.99, 0.95, 0.91, 0.89, 0.8)  # of 40 dB, plan by plan: the fourth and fifth do not keep it
    broken, made = 0, 0
    for _ in range(2000):
        scores = [[41.0 if draw.random() < chance else 0.0 for _ in range(80)] for chance in chances]
        chosen = certified(asked, scores)
        made += chosen is not None
        broken += chosen is not None and chances[chosen] < asked.fraction
    assert made > 1500 and broken <= 0.1 * 2000


def test_another_measure_can_be_asked():
    def nearness(images, references):
        return -(images - references).abs().flatten(1).amax(1)

    asked = h2cache.AtLeast(measure=nearness, least=-0.1)
    references = torch.rand(2, 3, 4, 4)
    assert asked.scores(references + 0.05, references) == pytest.approx([-0.05, -0.05], abs=1e-5)
    assert asked.name == "nearness" and asked.level == -0.1
    assert decibels(references + 0.1, references).tolist() == pytest.approx([20, 20], abs=1e-3)
    assert h2cache.AtLeast(psnr=40).scores(references, references) == pytest.approx([120, 120])


def test_a_promise_is_one_sentence():
    promise = Promise("PSNR", 40.0, 0.95, 0.9, "uncached", 80, 1)
    text = str(promise)
    assert text.count(".") == 1 and "95%" in text and "40 dB" in text and "80" in text and "90% confidence" in text
    assert Promise.from_notes(promise.to_notes()) == promise and Promise.from_notes(None) is None


@pytest.mark.parametrize(
    "fields",
    [{}, dict(psnr=40, least=3), dict(psnr=40, fraction=1), dict(psnr=40, confidence=0), dict(least=3)],
)
def test_what_cannot_be_asked(fields):
    with pytest.raises(ValueError, match="AtLeast"):
        h2cache.AtLeast(**fields)
