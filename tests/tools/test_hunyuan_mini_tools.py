"""hunyuan-mini's tools: clips and captions agree, videos are read right and wrong ones are not, held-out combinations
stay out of training."""

import json
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from repository import REPOSITORY

from h2cache.eval.metrics.clips import NOTHING, UNSTEADY, ClipAttributes, told
from h2cache.eval.metrics.motions import DIRECTIONS, FRAMES, MOTIONS, SHAPES, SIZE, SPEEDS, TRAVEL, poses
from tools.flux_mini.scenes import COLOURS
from tools.hunyuan_mini import evaluate, prompts, text, vae
from tools.hunyuan_mini.attributes import attributes_of, seen_in
from tools.hunyuan_mini.clips import (
    HELD_OUT_PHRASINGS,
    PHRASINGS,
    Clip,
    caption,
    draw,
    is_held_out,
    random_clip,
)
from tools.hunyuan_mini.latents import clip_at

STAR = Clip("star", "red", "blue", "right", "quickly")
NOISE = 8.0  # standard deviation, of 255


def some_clips(count: int, seed: int = 0) -> list[Clip]:
    rng = random.Random(seed)
    return [random_clip(rng, held_out=rng.random() < 0.5) for _ in range(count)]


def noisy(clip: Clip, seed: int) -> np.ndarray:
    return draw(clip) + np.random.default_rng(seed).normal(0, NOISE, (FRAMES, SIZE, SIZE, 3))


# Clips


def test_a_shape_travels_as_far_as_its_speed_says():
    for speed in SPEEDS:
        for name, (dx, dy) in DIRECTIONS.items():
            first, *_, last = poses(name, speed, 30, 40)
            assert (last.x - first.x, last.y - first.y) == pytest.approx((dx * TRAVEL[speed], dy * TRAVEL[speed]))
            assert ((first.x + last.x) / 2, (first.y + last.y) / 2) == pytest.approx((30, 40))


def test_a_shape_never_leaves_the_picture():
    """Its colour is nowhere on the border, which is where the reader looks for the background."""
    for clip in some_clips(150):
        video = draw(clip)
        border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1)
        assert (border == COLOURS[clip.background]).all(), clip


def test_a_part_of_a_clip_is_that_part():
    assert np.array_equal(draw(STAR, range(5, 9)), draw(STAR)[5:9])


@pytest.mark.parametrize("phrasings", [PHRASINGS, HELD_OUT_PHRASINGS], ids=["known", "held-out"])
def test_a_caption_tells_everything(phrasings):
    rng = random.Random(1)
    for clip in some_clips(150):
        for phrasing in phrasings:
            told_again = told(caption(clip, rng, [phrasing]), tuple(COLOURS))
            assert told_again == attributes_of(clip)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red cat moving left slowly on a blue background",
        "a red star on a blue background",
        "a red star moving left on a blue background",
        "a red star standing still quickly on a blue background",
        "a red star moving left slowly",
    ],
)
def test_what_is_no_caption_is_refused(prompt):
    with pytest.raises(ValueError):
        told(prompt, tuple(COLOURS))


# The reader


def test_drawn_clips_are_read_right():
    """With noise upon them, in at least 98 % of 200."""
    clips = some_clips(200, seed=2)
    right = [seen_in(noisy(clip, i)) == attributes_of(clip) for i, clip in enumerate(clips)]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize(
    "field, value",
    [("shape", "cross"), ("colour", "green"), ("background", "white"), ("motion", "left"), ("speed", "slowly")],
)
def test_a_video_of_something_else_is_read_as_that(field, value):
    other = seen_in(noisy(replace(STAR, **{field: value}), 0))
    assert other == replace(attributes_of(STAR), **{field: value})


def test_frozen_videos_are_never_as_asked():
    clips = [clip for clip in some_clips(80, seed=3) if clip.motion != "still"]
    for clip in clips:
        first = np.repeat(draw(clip)[:1], FRAMES, axis=0)
        assert seen_in(first).motion != clip.motion, clip


def test_shuffled_videos_are_never_as_asked():
    clips = [clip for clip in some_clips(80, seed=4) if clip.motion != "still"]
    for i, clip in enumerate(clips):
        order = np.random.default_rng(i).permutation(FRAMES)
        assert seen_in(draw(clip)[order]).motion != clip.motion, clip


def test_videos_backwards_go_the_other_way():
    assert seen_in(draw(STAR)[::-1]) == replace(attributes_of(STAR), motion="left")
    assert seen_in(draw(replace(STAR, motion="appearing"))[::-1]).motion == UNSTEADY


def test_an_empty_video_shows_nothing():
    empty = np.full((FRAMES, SIZE, SIZE, 3), COLOURS["pink"])
    assert seen_in(empty) == ClipAttributes(NOTHING, NOTHING, "pink", UNSTEADY, "")


def test_noise_is_no_clip():
    seen = [seen_in(np.random.default_rng(i).uniform(0, 255, (FRAMES, SIZE, SIZE, 3))) for i in range(10)]
    assert {each.motion for each in seen} <= {UNSTEADY, "still"}


def test_shares_are_counted_by_hand():
    asked = attributes_of(STAR)
    still = replace(asked, motion="still", speed="")
    scores = evaluate.shares(
        [(asked, asked), (asked, replace(asked, motion="left")), (still, replace(still, shape="ring"))]
    )
    assert scores["motion"] == pytest.approx(2 / 3) and scores["shape"] == pytest.approx(2 / 3)
    assert scores["all"] == pytest.approx(1 / 3) and scores["mean"] == pytest.approx(13 / 15)
    assert scores["direction"] == pytest.approx(1 / 2) and scores["count"] == 3


# What is held out


def test_training_draws_no_held_out_combination():
    """Neither the autoencoder's clips nor the pool's; and about a tenth of all combinations is held out."""
    rng = random.Random("0-8")
    clips = [random_clip(rng) for _ in range(3000)] + [clip_at(0, i) for i in range(3000)]
    assert not any(is_held_out(c.shape, c.colour, c.motion, c.speed) for c in clips)
    manners = [(m, s) for m in MOTIONS for s in (SPEEDS if m != "still" else ("",))]
    share = np.mean([is_held_out(s, c, *m) for s in SHAPES for c in COLOURS for m in manners])
    assert 0.08 < share < 0.12


def test_training_sees_every_pair_of_shape_colour_and_motion():
    manners = [(m, s) for m in MOTIONS for s in (SPEEDS if m != "still" else ("",))]
    seen = [(s, c, m) for s in SHAPES for c in COLOURS for m in manners if not is_held_out(s, c, *m)]
    assert len({(s, c) for s, c, _ in seen}) == len(SHAPES) * len(COLOURS)
    assert len({(s, m) for s, _, m in seen}) == len(SHAPES) * len(manners)
    assert len({(c, m) for _, c, m in seen}) == len(COLOURS) * len(manners)


def test_motion80_is_held_out_and_made_by_its_tool():
    rows = [json.loads(line) for line in (REPOSITORY / "assets/prompts/motion80.jsonl").read_text().splitlines()]
    assert rows == prompts.prompts(80, 80)
    for row in rows:
        asked = told(row["prompt"], tuple(COLOURS))
        assert asdict(asked).items() <= row.items()
        assert is_held_out(asked.shape, asked.colour, asked.motion, asked.speed)
    assert len({row["prompt"] for row in rows}) == 80


# Training


def test_the_tokenizers_are_the_same_whenever_they_are_built():
    for build in (text.build_llama_tokenizer, text.build_hunyuan_clip_tokenizer):
        once, again = build().get_vocab(), build().get_vocab()
        assert once == again and sorted(once.values()) == list(range(len(once)))


def test_llama_reads_every_word_of_the_grammar_as_one_token():
    tokenizer = text.build_llama_tokenizer()
    for prompt in text.corpus(seed=7, size=200):
        ids = tokenizer(prompt).input_ids
        words = prompt.replace(",", " ,").replace(":", " :").split()
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *(w if w in ",:" else f"▁{w}" for w in words)]
        assert len(ids) <= text.LLAMA_LENGTH
    assert len(tokenizer("").input_ids) == 1  # a prompt without a token would divide by zero


def test_muon_turns_convolutions_as_it_turns_their_matrices():
    torch.manual_seed(0)
    weight, gradient = torch.randn(4, 3, 3, 3, 3), torch.randn(4, 3, 3, 3, 3)
    kernel = torch.nn.Parameter(weight.clone())
    kernel.grad = gradient.clone()
    vae.ConvolutionMuon([kernel], 0.1).step()
    matrix = torch.nn.Parameter(weight.view(4, -1).clone())
    matrix.grad = gradient.view(4, -1).clone()
    torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    assert not torch.equal(kernel.detach(), weight)
    torch.testing.assert_close(kernel.detach().view(4, -1), matrix.detach())


def test_psnr_of_frames_is_that_of_the_formula():
    pixels = torch.zeros(1, 3, 2, 4, 4)
    off = pixels.clone()
    off[:, :, 1] += 0.2
    torch.testing.assert_close(vae.decibels(off, pixels)[0, 1], torch.tensor(20.0))


def test_the_shape_weighs_more_where_it_is():
    """And two pixels around it, and where it was in the frame before and will be in the next."""
    pixels = torch.zeros(1, 3, 3, 11, 11)
    pixels[:, :, 1, 5, 5] = 1.0
    weights = vae.shape_weights(pixels)
    expected = torch.ones(1, 1, 3, 11, 11)
    expected[:, :, :, 3:8, 3:8] = vae.SHAPE_WEIGHT
    assert torch.equal(weights, expected)
