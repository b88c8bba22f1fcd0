"""What prompts ask for is read from pictures whose truth is known: from scenes that are drawn and not generated."""

import math
import random
from dataclasses import replace

import pandas as pd

from h2cache.eval.metrics.registry import Metrics
from h2cache.eval.report.results import BASELINE, Results
from h2cache.eval.report.tables import Adherence, AttributeChanges
from h2cache.eval.report.tables.statistics import McNemar, mcnemar
from tools.flux_mini.scenes import COLOURS, Scene, caption, contrast, draw, random_scene

WORDS = ["STOP", "CAFE"]
SCENES = [random_scene(random.Random(k), WORDS[k % 2]) for k in range(8)]


def measured(folder, settings: dict[str, list[Scene]]) -> Results:
    """Each setting's images show the scenes given; the prompts ask for SCENES."""
    rows = []
    for setting, shown in settings.items():
        for k, (asked, scene) in enumerate(zip(SCENES, shown, strict=True)):
            file = folder / f"{setting}{k}.png"
            draw(scene).save(file)
            prompt = caption(asked, random.Random(k))
            rows.append(
                {
                    "setting": setting,
                    "prompt_id": f"p{k}",
                    "seed": 0,
                    "prompt": prompt,
                    "word": asked.word,
                    "image": file,
                }
            )
    told = {"name": "a", "title": "", "description": "", "metrics": (), "unavailable": {}, "model": "flux-mini"}
    return Results(**told, frame=pd.DataFrame(rows), machine="cpu", command="", converged_run="400 steps")


def made(table: Adherence | AttributeChanges, results: Results, folder) -> tuple[dict, tuple[str, ...], pd.DataFrame]:
    """The rows by their first cell, the notes, and the CSV."""
    artifact = table.make(results, folder)
    rows = {first: list(others) for first, *others in artifact.table.rows}
    return rows, artifact.table.notes, pd.read_csv(artifact.files[1])


def repainted(scene: Scene) -> Scene:
    """Before another wall, of a colour that the sign does not have."""
    names = [name for name in COLOURS if name != scene.wall_colour and contrast(name, scene.shape_colour) > 110]
    return replace(scene, wall="plain", wall_colour=names[0])


def test_the_metric_is_the_share_of_five_attributes_that_the_picture_shows():
    metrics = Metrics(["attributes"])
    for scene in SCENES:
        prompt = caption(scene, random.Random(0))
        assert metrics.score("attributes", draw(scene), None, prompt, scene.word) == 1
        assert metrics.score("attributes", draw(repainted(scene)), None, prompt, scene.word) == 0.8
        assert math.isnan(metrics.score("attributes", draw(scene), None, "a red cat", None))
        assert math.isnan(metrics.score("attributes", draw(scene).resize((64, 64)), None, prompt, scene.word))


def test_adherence_counts_what_is_lost_and_gained(tmp_path):
    """Six of eight images get another wall, one of which the baseline had wrong; the last word is another."""
    baseline = [repainted(SCENES[0]), *SCENES[1:]]
    cached = [SCENES[0], *map(repainted, SCENES[1:7]), replace(SCENES[7], word="STOP")]
    settings = {BASELINE: baseline, "Same": baseline, "Cached": cached}
    table, notes, data = made(Adherence(), measured(tmp_path, settings), tmp_path)
    assert table[BASELINE][0] == "88 %" and table[BASELINE][2:5] == ["–"] * 3
    assert [*table["Same"][2:5], *table["Same"][7:]] == ["0", "0", "1.000"] * 2
    assert table["Cached"][0] == "25 %" and table["Cached"][2:5] == ["6", "1", "0.125"]
    assert table["Cached"][5] == "88 %" and table["Cached"][7:] == ["1", "0", "1.000"]
    assert "No setting shows all that is asked for more or less often" in notes[0]
    assert len(data) == 24 and data[data["setting"] == "Cached"]["right"].sum() == 2


def test_a_change_beyond_chance_is_said(tmp_path):
    settings = {BASELINE: SCENES, "Cached": [repainted(scene) for scene in SCENES]}
    table, notes, _ = made(Adherence(), measured(tmp_path, settings), tmp_path)
    assert table["Cached"][4] == f"{2 * 0.5**8:.3f}"
    assert "these show all that is asked for less often: Cached." in notes[0]


def test_attributes_that_changed_are_counted_one_by_one(tmp_path):
    cached = [repainted(SCENES[0]), *SCENES[1:7], replace(SCENES[7], word="STOP")]
    table, notes, data = made(AttributeChanges(), measured(tmp_path, {BASELINE: SCENES, "Cached": cached}), tmp_path)
    assert table["Cached"] == ["0", "0", "1", "0", "0", "1", "8"]
    assert "something in 2 of 8 images" in notes[0]
    assert data.filter(like="seen").sum().sum() == 2


def test_there_is_no_table_of_pictures_that_nobody_can_read(tmp_path):
    measures = measured(tmp_path, {BASELINE: SCENES, "Cached": SCENES})
    free = replace(measures, frame=measures.frame.assign(prompt="a cat in the rain"))
    without = replace(measures, frame=measures.frame[measures.frame["setting"] != BASELINE])
    for table in (Adherence(), AttributeChanges()):
        assert table.make(free, tmp_path) is None and table.make(without, tmp_path) is None


def test_mcnemar_looks_at_the_pairs_that_changed():
    index = pd.MultiIndex.from_product([["a", "b", "c", "d", "e", "f", "g"], [0]])
    before = pd.Series([1, 1, 1, 1, 0, 0, math.nan], index)
    now = pd.Series([0, 0, 0, 1, 1, 0, 1.0], index).iloc[::-1]
    assert mcnemar(now, before) == McNemar(lost=3, gained=1, p=0.625)
    assert mcnemar(before, before) == McNemar(0, 0, 1.0)
