"""flux-mini's tools: scenes and captions agree, pictures are read right, and scores are what one counts by hand."""

import json
import math
import random
import string
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from repository import REPOSITORY

from h2cache.eval.metrics.attributes import LAYOUTS, look, told
from h2cache.eval.metrics.reader import CLASSES, decode
from h2cache.eval.metrics.signs import WINDOW
from tools.flux_mini import evaluate, prompts, reader, text, vae
from tools.flux_mini.attributes import attributes_of, letters_of, signs, window_corner
from tools.flux_mini.scenes import (
    COLOURS,
    FONTS,
    HELD_OUT_PHRASINGS,
    HELD_OUT_WORDS,
    LETTER_GRID,
    PHRASINGS,
    SHAPES,
    SIZE,
    WALLS,
    WORDS,
    Scene,
    caption,
    draw,
    letter_boxes,
    letter_map,
    random_scene,
    random_word,
)
from tools.flux_mini.scores import Reading, attribute_scores, levenshtein, score, word_scores

PROMPTS = REPOSITORY / "assets/prompts"
STOP = Scene("octagonal sign", "red", "STOP", "white", "straight", "bold", "plain", "blue")


def some_scenes(count: int, seed: int = 0, word: str | None = None) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, word) for _ in range(count)]


def test_the_tokenizers_are_the_same_whenever_they_are_built():
    """A stage that goes on in another process must give its words the same numbers."""
    for build in (text.build_t5_tokenizer, lambda: text.build_clip_tokenizer(text.corpus(), text.CLIP_LENGTH)):
        once, again = build().get_vocab(), build().get_vocab()
        assert once == again and sorted(once.values()) == list(range(len(once)))


# The grammar


@pytest.mark.parametrize("phrasings", [PHRASINGS, HELD_OUT_PHRASINGS], ids=["known", "held-out"])
def test_a_caption_tells_everything(phrasings):
    """Word, attributes, font and wall can all be read back from the caption alone."""
    rng = random.Random(1)
    for scene in some_scenes(200):
        for phrasing in phrasings:
            text = caption(scene, rng, [phrasing])
            assert told(text, signs()) == attributes_of(scene)
            assert text.count('"') == 2 and f'"{scene.word}"' in text
            assert f"{scene.text_colour} {scene.font} letters" in text
            wall = {"plain": "background", "brick": "brick wall", "striped": "striped wall"}[scene.wall]
            assert f"{scene.wall_colour} {wall}" in text


def test_what_is_no_caption_is_refused():
    with pytest.raises(ValueError, match="a red cat"):
        told("a red cat", signs())


def opening(text: str) -> str:
    """The words of a caption that its phrasing owns: everything that scenes fill in, left out."""
    filled = [*COLOURS, *SHAPES, *FONTS, "in a straight line", "in an arch", "background", "brick wall", "striped wall"]
    for part in filled:
        text = text.replace(part, "")
    return " ".join(word for word in text.replace(",", "").split() if word not in ("a", "an") and '"' not in word)


def test_held_out_phrasings_are_never_used_in_training():
    """`caption` without a third argument is what training calls."""
    rng = random.Random(2)
    scenes = some_scenes(300)
    seen = {opening(caption(scene, rng)) for scene in scenes}
    held_out = {opening(caption(scene, rng, HELD_OUT_PHRASINGS)) for scene in scenes}
    assert len(seen) == len(PHRASINGS) and len(held_out) == len(HELD_OUT_PHRASINGS)
    assert not seen & held_out and not set(PHRASINGS) & set(HELD_OUT_PHRASINGS)


def test_held_out_words_are_never_drawn():
    assert not set(WORDS) & set(HELD_OUT_WORDS)
    assert len(set(HELD_OUT_WORDS)) == len(HELD_OUT_WORDS)
    rng = random.Random(3)
    for draw_word in (random_word, reader.random_string):
        drawn = {draw_word(rng) for _ in range(20_000)}
        assert not drawn & set(HELD_OUT_WORDS)
        assert {len(word) for word in drawn} <= set(range(2, 9))


class SpellsGate(random.Random):
    """Spells GATE, a held-out word, as its first random string, and TEAK as its second."""

    def __init__(self):
        super().__init__(0)
        self.strings = iter(["GATE", "TEAK"])

    def random(self):
        return 0.99  # not from the vocabulary

    def choices(self, population, **kwargs):
        return list(next(self.strings))


@pytest.mark.parametrize("draw_word", [random_word, reader.random_string])
def test_a_held_out_word_that_chance_spells_is_drawn_again(draw_word):
    assert draw_word(SpellsGate()) == "TEAK"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_letters_stand_where_their_boxes_say(shape, layout):
    """The drawing differs from one without the word inside the boxes only, and inside every box; all lie within the
    image, in reading order, and the map names them."""
    scene = Scene(shape, "white", "HELMET", "black", layout, "bold", "plain", "red", (3, -3))
    letters = letter_boxes(scene)
    assert "".join(letter.character for letter in letters) == "HELMET"
    assert all(a.x < b.x for a, b in pairwise(letters))
    for letter in letters:
        reach = math.hypot(letter.width, letter.height) / 2
        assert reach <= letter.x <= SIZE - reach and reach <= letter.y <= SIZE - reach
    empty = draw(replace(scene, word="", layout="arched"))
    changed = np.abs(np.asarray(draw(scene), int) - np.asarray(empty, int)).sum(axis=-1) > 100
    mask = evaluate.letter_mask(scene)
    assert changed.any() and not (changed & ~mask).any()
    for letter in letters:
        x, y = round(letter.x), round(letter.y)
        assert changed[y - 8 : y + 9, x - 5 : x + 6].any()
    cells = np.asarray(letter_map(scene))
    assert cells.shape == (SIZE // LETTER_GRID,) * 2
    named = {string.ascii_uppercase[value - 1] for value in np.unique(cells) if value}
    assert named == set("HELMT")
    # Whatever is drawn lies in or beside a cell that has a letter.
    near = np.asarray(Image.fromarray(cells).resize((SIZE, SIZE), Image.Resampling.NEAREST)) > 0
    near = np.asarray(Image.fromarray(near).convert("L").filter(ImageFilter.MaxFilter(2 * LETTER_GRID + 1)))
    assert not (changed & (near == 0)).any()
    for letter in letters:
        cell = cells[int(letter.y) // LETTER_GRID, int(letter.x) // LETTER_GRID]
        assert string.ascii_uppercase[cell - 1] == letter.character


def test_the_autoencoder_sees_letters_and_their_pixels_count_more():
    pixels, weights = vae.crops(random.Random(0), 40)
    assert pixels.shape == (40, 3, 64, 64) and weights.shape == (40, 1, 64, 64)
    heavy = weights > 1
    assert set(weights.unique().tolist()) == {1, 1 + vae.LETTER_WEIGHT}
    assert heavy[::2].flatten(1).any(dim=1).all()  # every other crop is around a letter
    steps = (pixels[..., 1:] - pixels[..., :-1]).abs().mean(dim=1, keepdim=True)
    assert steps[heavy[..., 1:]].mean() > 3 * steps[~heavy[..., 1:]].mean()  # that is where the edges are


def test_the_losses_of_the_autoencoder_are_weighted_means():
    pixels = torch.zeros(1, 1, 2, 2)
    reconstruction, weights = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]), torch.tensor([[[[1.0, 3.0], [2.0, 1.0]]]])
    l1, edge = vae.pixel_losses(reconstruction, pixels, weights)
    assert l1.item() == 1 / 4
    assert edge.item() == 2 / 2 + 3 / 2  # down from the bright pixel, and across from it


def test_letters_of_any_scene_lie_within_the_image():
    for scene in some_scenes(400, seed=4):
        for letter in letter_boxes(scene):
            c, n = abs(math.cos(letter.angle)), abs(math.sin(letter.angle))
            dx, dy = (letter.width * c + letter.height * n) / 2, (letter.width * n + letter.height * c) / 2
            assert dx <= letter.x <= SIZE - dx and dy <= letter.y <= SIZE - dy


# Reading pictures


@pytest.mark.parametrize("wall", WALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attributes_are_read_back_from_renders(shape, wall):
    for i, scene in enumerate(some_scenes(6, seed=5)):
        scene = replace(scene, shape=shape, wall=wall, word=HELD_OUT_WORDS[i * 5])
        assert look(draw(scene), signs()).attributes == attributes_of(scene)


def test_letters_are_seen_whole_and_alone():
    """Every pixel that the word changes is in the window, and little else, in training as in evaluation."""
    for scene in some_scenes(60, seed=6):
        image = draw(scene)
        empty = np.asarray(draw(replace(scene, word="", layout="arched")), int)
        changed = np.abs(np.asarray(image, int) - empty).max(axis=-1) > 60
        left, top = window_corner(scene)
        rows, columns = WINDOW
        inside = np.zeros_like(changed)
        inside[top : top + rows, left : left + columns] = True
        assert not (changed & ~inside).any(), scene
        letters = letters_of(scene)
        seen = letters[changed[top : top + rows, left : left + columns]] > 0.1
        assert seen.mean() > 0.995, scene  # a high arc may touch the edge of its sign, where nothing is seen
        assert (letters > 0.5).sum() < 1.2 * changed.sum(), scene
        # The shape may be found a pixel off, and the window with it.
        assert look(image, signs()).letters.sum() == pytest.approx(letters.sum(), rel=0.02), scene


def test_an_image_without_a_word_has_a_shape_all_the_same():
    seen = look(draw(replace(STOP, word="", layout="arched")), signs()).attributes
    assert (seen.shape, seen.shape_colour, seen.wall_colour) == ("octagonal sign", "red", "blue")
    assert seen.layout == "straight"
    with pytest.raises(ValueError, match="64"):
        look(Image.new("RGB", (64, 64)), signs())


def test_the_reader_sees_the_same_whoever_asks():
    """Batches are a function of seed and step, and their frames name the letters of their words in order."""
    a, b = reader.examples(seed=0, step=7, count=4), reader.examples(seed=0, step=7, count=4)
    assert torch.equal(a.letters, b.letters) and a.words == b.words
    assert not torch.equal(a.letters, reader.examples(seed=0, step=8, count=4).letters)
    perfect = torch.nn.functional.one_hot(a.frames, CLASSES).float()
    assert decode(perfect) == a.words
    ctc, frames = reader.losses(100 * perfect, a)
    assert ctc < 0.01 and frames < 0.01


def test_ctc_s_path_is_collapsed():
    """Repetitions are one letter unless a blank parts them."""
    path = [0, 1, 1, 0, 1, 2, 2, 0, 0, 26]
    logits = torch.nn.functional.one_hot(torch.tensor([path, [0] * 10]), CLASSES)
    assert decode(logits) == ["AABZ", ""]


def test_training_the_reader_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """Two steps at once, or one and one more, give the same weights; a finished reader is only loaded."""
    monkeypatch.setattr(reader, "VALIDATION", 2)
    monkeypatch.setattr(reader, "cosine", lambda step, steps: 0.01)  # the schedule knows how many steps there will be
    whole = reader.train(tmp_path / "whole", steps=2, batch=2)
    reader.train(tmp_path / "parts", steps=1, batch=2)
    parts = reader.train(tmp_path / "parts", steps=2, batch=2)
    loaded = reader.train(tmp_path / "parts", steps=2, batch=2)
    for a, b, c in zip(whole.parameters(), parts.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


# Scores


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("", "", 0),
        ("STOP", "STOP", 0),
        ("STOP", "", 4),
        ("", "STOP", 4),
        ("STOP", "SHOP", 1),
        ("STOP", "STOPS", 1),
        ("STOP", "TOP", 1),
        ("STOP", "TOPS", 2),
        ("KITTEN", "SITTING", 3),
    ],
)
def test_levenshtein(a, b, edits):
    assert levenshtein(a, b) == levenshtein(b, a) == edits


def test_word_scores():
    """1 + 0 + 3 edits in 4 + 4 + 2 letters; more edits than letters make a rate above 1."""
    assert word_scores([("STOP", "SHOP"), ("GATE", "GATE"), ("TV", "XYZ")]) == {
        "count": 3,
        "right": 1,
        "accuracy": pytest.approx(1 / 3),
        "cer": pytest.approx(4 / 10),
    }
    assert word_scores([("TV", "XXXX")])["cer"] == 2
    with pytest.raises(ValueError, match="no words"):
        word_scores([])


def test_attribute_scores():
    asked = attributes_of(STOP)
    wrong = replace(asked, shape="label", wall_colour="green")
    scores = attribute_scores([(asked, asked), (asked, wrong), (asked, replace(asked, shape="jersey")), (asked, asked)])
    assert scores == {
        "count": 4,
        "shape": 0.5,
        "shape_colour": 1,
        "wall_colour": 0.75,
        "text_colour": 1,
        "layout": 1,
        "mean": pytest.approx(0.85),
        "all": 0.5,
    }
    with pytest.raises(ValueError, match="no attributes"):
        attribute_scores([])


def test_scores_by_group():
    a = attributes_of(STOP)
    b = replace(a, layout="arched")
    readings = [
        Reading("GATE", "GATE", a, a, "known"),
        Reading("CORNER", "CORNET", a, b, "held_out"),
        Reading("STOP", "", a, a, None),
    ]
    scores = score(readings, known_words=["STOP"])
    counts = {name: (group["words"]["right"], group["words"]["count"]) for name, group in scores.items()}
    assert counts == {
        "all": (1, 3),
        "up_to_5_letters": (1, 2),
        "over_5_letters": (0, 1),
        "known_phrasing": (1, 1),
        "held_out_phrasing": (0, 1),
        "known_words": (0, 1),
        "held_out_words": (1, 2),
    }
    assert scores["all"]["words"]["cer"] == pytest.approx(5 / 14)
    assert scores["held_out_phrasing"]["attributes"]["layout"] == 0
    assert "known_words" not in score(readings)
    assert list(score(readings[:1])) == ["all", "up_to_5_letters", "known_phrasing", "held_out_words"]


def test_psnr_and_the_mask_of_letters():
    """A difference of 10 in every channel is 20 log10(255 / 10) dB, over all pixels as over any of them."""
    gray, lighter = Image.new("RGB", (SIZE, SIZE), (100,) * 3), Image.new("RGB", (SIZE, SIZE), (110,) * 3)
    expected = 20 * math.log10(25.5)
    assert evaluate.psnr(gray, lighter) == pytest.approx(expected)
    mask = evaluate.letter_mask(STOP)
    assert 0 < mask.sum() < 0.4 * mask.size and evaluate.psnr(gray, lighter, mask) == pytest.approx(expected)
    assert evaluate.psnr(gray, gray) == math.inf


def test_the_readers_own_errors_are_shares_of_images():
    """Two of four scenes are shown with another wall, and a reader that knows one answer has one word of four right."""

    class Parrot(torch.nn.Module):
        def forward(self, letters):
            path = [1 + string.ascii_uppercase.index(c) for c in "STOP"]
            return torch.nn.functional.one_hot(torch.tensor([path] * len(letters)), CLASSES)

    scenes = [replace(STOP, word=word) for word in ("STOP", "SHOP", "CORNER", "BAKERY")]
    images = [draw(replace(scene, wall_colour=wall)) for scene, wall in zip(scenes, ["blue", "green"] * 2, strict=True)]
    errors = evaluate.own_errors(Parrot(), scenes, images)
    assert {name: errors[name] for name in evaluate.ATTRIBUTES} == {
        "shape": 0,
        "shape_colour": 0,
        "wall_colour": 0.5,
        "text_colour": 0,
        "layout": 0,
    }
    assert (errors["count"], errors["word"], errors["word_up_to_5_letters"]) == (4, 0.75, 0.5)


def results(weights: str = "0") -> dict:
    a = attributes_of(STOP)
    error = dict.fromkeys((*evaluate.ATTRIBUTES, "word", "word_up_to_5_letters", "cer"), 0.025)
    return {
        "measured": {"weights_sha256": weights},
        "own_error": {"renders": error, "reconstructions": error},
        "vae": {"count": 400, "psnr": 29.12, "psnr_letters": 25.96},
        "scores": score([Reading("GATE", "GATE", a, a), Reading("CORNER", "CORNET", a, a)]),
    }


def test_tables_show_the_numbers():
    text = evaluate.tables(results())
    assert "| all | 1 of 2 | 50.0 % | 10.0 % | 100.0 % | 100.0 % |" in text
    assert "| word of up to 5 letters | 100.0 % | 2.5 % | 2.5 % |" in text
    assert "400 held-out scenes: 29.1 dB PSNR, 26.0 dB on their letters" in text


def test_other_weights_are_measured_anew(tmp_path, monkeypatch):
    """A saved evaluation counts for the weights and prompts that it names, and for no others."""
    folder, asked = tmp_path / "model", tmp_path / "prompts.jsonl"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae/model.safetensors").write_bytes(b"one")
    asked.write_text("{}")
    monkeypatch.setattr(evaluate, "evaluate", lambda work, folder, prompts: "measured")
    assert evaluate.evaluation(tmp_path, folder, asked) == "measured"
    saved = results() | {"measured": evaluate.identity(folder, asked)}
    (tmp_path / "evaluation.json").write_text(json.dumps(saved))
    assert evaluate.evaluation(tmp_path, folder, asked) == saved
    (folder / "vae/model.safetensors").write_bytes(b"two")
    assert evaluate.evaluation(tmp_path, folder, asked) == "measured"


# Prompts


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (PROMPTS / name).read_text().splitlines()]


@pytest.mark.parametrize("name", ["signs80.jsonl", "cute80.jsonl"])
def test_80_prompts_each_with_its_word(name):
    asked = rows(name)
    assert len(asked) == len({row["id"] for row in asked}) == len({row["prompt"] for row in asked}) == 80
    assert all(row["word"] and f'"{row["word"]}"' in row["prompt"] for row in asked)


def test_signs80_is_held_out_and_made_by_its_tool():
    asked = rows("signs80.jsonl")
    assert asked == prompts.prompts(count=80, seed=80)
    assert Counter(row["word"] for row in asked) == dict.fromkeys(HELD_OUT_WORDS, 2)
    assert len({(row["word"], row["phrasing"]) for row in asked}) == 80, "each word once in each group of phrasings"
    seen = {opening(caption(scene, random.Random(i))) for i, scene in enumerate(some_scenes(300))}
    assert all((opening(row["prompt"]) in seen) == (row["phrasing"] == "known") for row in asked)


def test_cute80_is_in_single_sentences():
    asked = rows("cute80.jsonl")
    assert [row["id"] for row in asked] == [f"cute{i:03d}" for i in range(1, 81)]
    assert all(12 <= len(row["prompt"].split()) <= 35 and row["prompt"].endswith(".") for row in asked)
