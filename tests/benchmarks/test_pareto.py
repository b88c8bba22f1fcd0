"""`benchmarks.pareto`: rivals that work and leave nothing behind, work counted where it is done, frontiers by hand."""

import contextlib
import csv
import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image
from scipy.stats import ttest_rel
from tiny import TEXT_TOKENS
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.peers
import h2cache
from baselines import BlockCacheConfig, ClusCaConfig, TaylorSeerConfig
from benchmarks import frontier_report, pareto
from benchmarks.count import WorkCounter
from benchmarks.frontier import Point, advantage, around, at_speedup, frontier, mean_interval, speedup_at
from benchmarks.measure import Bench, Record, Records, Task
from benchmarks.peers import OURS, Contender, assemble, own_copy
from eval.errors import UserError
from eval.generation.generate import generate
from h2cache import H2CacheConfig
from h2cache.plans.conditions import Conditions

STEPS, BLOCKS = 10, 5
CALL = dict(height=64, width=64, num_inference_steps=STEPS, guidance_scale=3.5, max_sequence_length=TEXT_TOKENS)
TASK = Task("test", "one", "a red sign", 3)
PEERS = ("diffusers", "cache-dit")


def draw(pipe: FluxPipeline) -> bytes:
    return generate(pipe, TASK.prompt, TASK.seed, **CALL).image.tobytes()


@pytest.fixture
def everyone(tiny_pipe, tmp_path) -> list[Contender]:
    return assemble(tiny_pipe, ["a sign"], CALL, (1.0, 0.0), tmp_path / "no plans")[0]


def by_method(contenders: list[Contender]) -> dict[tuple[str, str], list[Contender]]:
    found: dict[tuple[str, str], list[Contender]] = {}
    for contender in contenders:
        found.setdefault((contender.library, contender.method), []).append(contender)
    return found


# What is counted


def test_an_uncached_run_is_its_steps_times_its_blocks(tiny_pipe):
    """Multiply-adds are half the FLOPs that torch counts in the blocks."""
    with WorkCounter(tiny_pipe.transformer) as counter, FlopCounterMode(display=False) as flops:
        draw(tiny_pipe)
    counts = flops.get_flop_counts()
    blocks = [name for name in counts if name.split(".")[-2:-1] and name.split(".")[-2].endswith("transformer_blocks")]
    assert len(blocks) == BLOCKS and counter.attentions == STEPS * BLOCKS
    assert 2 * counter.multiply_adds == sum(sum(counts[name].values()) for name in blocks)


@pytest.mark.parametrize("config", [H2CacheConfig(tau1=0.3, tau2=0.3), BlockCacheConfig(0.3)], ids=["h2", "block"])
def test_the_count_is_the_fraction_that_the_trace_has(tiny_pipe, config):
    with WorkCounter(tiny_pipe.transformer) as counter, h2cache.apply(tiny_pipe, config) as handle:
        draw(tiny_pipe)
    assert 0.2 < handle.summary()["computed_fraction"] < 0.9
    assert counter.attentions / (STEPS * BLOCKS) == pytest.approx(handle.summary()["computed_fraction"])


def test_a_linear_layer_whose_answer_was_forecast_costs_nothing(tiny_pipe):
    """diffusers' TaylorSeer calls `proj_out` at every step, and forecasts what it would return at most of them."""
    pipe = own_copy(tiny_pipe)
    contender = next(
        each
        for each in diffusers_contenders(pipe)
        if each.name == "diffusers: TaylorSeer, modules, interval = 5, order = 1, before = 3"
    )
    with WorkCounter(pipe.transformer) as counter:
        draw(pipe)
        whole = counter.multiply_adds
        counter.reset()
        with contender.attach(pipe):
            draw(pipe)
    assert counter.attentions == 5 * BLOCKS  # steps 0, 1, 2, 4 and 9
    assert counter.multiply_adds / whole == pytest.approx(0.5, abs=0.05)  # the norms' layers go on


def diffusers_contenders(pipe: FluxPipeline) -> list[Contender]:
    from benchmarks.peers import diffusers_hooks

    return list(diffusers_hooks.contenders(pipe, ["a sign"], CALL))


def test_fresh_tokens_of_clusters_are_counted(tiny_pipe):
    work = []
    for config in (TaylorSeerConfig(interval=3), ClusCaConfig(interval=3, clusters=3)):
        with WorkCounter(tiny_pipe.transformer) as counter, h2cache.apply(tiny_pipe, config):
            draw(tiny_pipe)
        work.append((counter.attentions, counter.multiply_adds))
    assert work[0][0] == work[1][0] and work[0][1] < work[1][1]


def test_counting_leaves_the_layers_as_they_were(tiny_pipe):
    before = draw(tiny_pipe)
    with WorkCounter(tiny_pipe.transformer):
        assert draw(tiny_pipe) == before
    assert not [name for name, each in tiny_pipe.transformer.named_modules() if "forward" in each.__dict__]


# Who takes part


def test_names_are_unique(everyone):
    names = [contender.name for contender in everyone]
    assert len(set(names)) == len(names) > 300
    assert {contender.library for contender in everyone} >= {OURS, "diffusers"}


def test_every_method_skips_draws_nearly_the_same_and_leaves_nothing(tiny_pipe, everyone):
    """The fastest setting of each method's sweep, ours and rivals alike."""
    pipes = {OURS: tiny_pipe}
    plain = draw(tiny_pipe)
    for (library, method), contenders in by_method(everyone).items():
        pipe = pipes.setdefault(library, own_copy(tiny_pipe))
        contender = contenders[-1]
        with WorkCounter(pipe.transformer) as counter:
            with contender.attach(pipe):
                drawn = draw(pipe)
            assert 0 < counter.attentions < STEPS * BLOCKS, contender.name
        assert draw(pipe) == plain, f"{method} left something behind"
        difference = np.frombuffer(drawn, np.uint8).astype(float) - np.frombuffer(plain, np.uint8)
        assert 0 < np.abs(difference).mean() < 40, contender.name


def test_rivals_do_not_touch_the_pipeline_that_is_ours(tiny_pipe, everyone):
    pytest.importorskip("cache_dit")
    pipe = own_copy(tiny_pipe)
    called = FluxPipeline.__call__
    contender = next(each for each in everyone if each.library == "cache-dit" and "skips = 3" in each.setting)
    with WorkCounter(tiny_pipe.transformer) as counter, contender.attach(pipe):
        assert FluxPipeline.__call__ is called
        draw(tiny_pipe)
    assert counter.attentions == STEPS * BLOCKS


def test_without_cache_dit_it_is_said_what_is_missing(tiny_pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.cache_dit_blocks", raising=False)
    monkeypatch.delattr(benchmarks.peers, "cache_dit_blocks", raising=False)
    contenders, left_out = assemble(tiny_pipe, ["a sign"], CALL, (1.0,), tmp_path)
    assert "pip install cache-dit" in left_out["cache-dit"]
    assert {contender.library for contender in contenders} == {OURS, "diffusers"}


def test_plans_of_this_number_of_steps_take_part(tiny_pipe, tmp_path):
    """Under a name that changes with the plan, so that records of an earlier one are not taken for its own."""
    names = []
    for last in (8, 9):
        computed = (0, 2, 4, 6, last)
        weights = {step: (1.0,) for step in range(STEPS) if step not in computed}
        h2cache.Plan(Conditions(steps=STEPS), computed, weights).save(tmp_path / "mini.json")
        contenders, left_out = assemble(tiny_pipe, ["a sign"], CALL, (1.0,), tmp_path)
        (found,) = [contender for contender in contenders if contender.method == "plan"]
        names.append(found.name)
        assert "plans" not in left_out and "file = mini" in found.setting
        assert "plans" in assemble(tiny_pipe, ["a sign"], CALL | {"num_inference_steps": 9}, (1.0,), tmp_path)[1]
    with WorkCounter(tiny_pipe.transformer) as counter, found.attach(tiny_pipe):
        draw(tiny_pipe)
    assert counter.attentions == 5 * BLOCKS and names[0] != names[1]


def test_ratios_of_magnitudes_are_diffusers_own(tiny_pipe):
    from benchmarks.peers.diffusers_hooks import magnitude_ratios

    one, other, both = (magnitude_ratios(tiny_pipe, prompts, CALL) for prompts in (["a"], ["a"], ["a", "b"]))
    assert len(one) == STEPS and one[0] == 1.0 and one == other and all(0.2 < ratio < 5 for ratio in one)
    assert both != one


# Frontiers, by hand


def point(name: str, work: float, *psnr: float, wall: float = 1.0) -> Point:
    constant = np.full(len(psnr), 1.0)
    return Point(name, work * constant, wall * constant, np.array(psnr), np.array(psnr) / 100)


def test_a_frontier_is_what_nothing_beats():
    points = [point("a", 0.5, 40), point("b", 0.5, 41), point("c", 0.25, 38), point("d", 0.3, 37), point("e", 0.1, 20)]
    assert [each.setting for each in frontier(points)] == ["b", "c", "e"]


def test_between_settings_psnr_is_linear_in_the_logarithm_of_work():
    points = [point("slow", 1 / 2, 40, 50, wall=2.0), point("fast", 1 / 8, 30, 20, wall=8.0)]
    assert at_speedup(points, 4.0, "psnr") == pytest.approx([35, 35])
    assert at_speedup(points, 2.0, "psnr") == pytest.approx([40, 50])
    assert at_speedup(points, 8.05, "psnr") == pytest.approx([30, 20])  # within 1 %
    assert at_speedup(points, 4.0, "wall") == pytest.approx([4, 4])
    assert at_speedup(points, 9.0, "psnr") is None
    assert at_speedup(points, 1.5, "psnr") == pytest.approx([40, 50])  # faster than asked
    assert at_speedup([], 2.0, "psnr") is None


def test_the_speedup_at_a_psnr_is_the_inverse():
    points = [point("slow", 1 / 2, 40, 50), point("fast", 1 / 8, 30, 20)]
    assert speedup_at(points, 35.0) == pytest.approx(4.0)
    assert speedup_at(points, 45.0) == pytest.approx(2.0) and speedup_at(points, 46.0) is None
    assert speedup_at(points, 20.0) == pytest.approx(8.0)  # all have more


def test_neighbours_of_each_speedup_are_kept():
    points = [point(str(speed), 1 / speed, 50 - speed) for speed in (1.5, 2.5, 3.5, 5, 7, 9)]
    assert [each.setting for each in around(points, (3, 6))] == ["2.5", "3.5", "5", "7"]
    assert [each.setting for each in around(points, (20,))] == ["9"]


def test_intervals_are_student_s():
    ours, theirs = np.array([40.0, 42, 39, 44]), np.array([38.0, 41, 35, 41])
    value, expected = mean_interval(ours - theirs), ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (value.mean, value.low, value.high) == pytest.approx((2.5, expected.low, expected.high))
    assert np.isnan(mean_interval(np.array([1.0])).low)


def test_the_advantage_is_the_ratio_of_speedups_at_the_same_psnr():
    """The champion has at 6x what the rival has at 4x, whichever prompts are drawn; times are 5.0 and 2.5."""
    rival = [point("r2", 1 / 2, 42, 41, 43, wall=2.0), point("r4", 1 / 4, 38, 37, 39, wall=2.5)]
    champion = [point("c4", 1 / 4, 41, 40, 42, wall=4.0), point("c6", 1 / 6, 38, 37, 39, wall=5.0)]
    found = advantage(champion, rival, 4.0)
    assert found.psnr == 38 and found.blocks.mean == pytest.approx(1.5) and found.wall.mean == pytest.approx(2.0)
    assert found.blocks.low == pytest.approx(1.5) and found.blocks.high == pytest.approx(1.5)
    assert not found.at_least and advantage(champion, rival, 5.0) is None


def test_an_advantage_beyond_the_champion_s_fastest_setting_is_a_lower_bound():
    rival = [point("r4", 1 / 4, 36, 35, 37)]
    champion = [point("c4", 1 / 4, 41, 40, 42), point("c6", 1 / 6, 38, 37, 39)]
    found = advantage(champion, rival, 4.0)
    assert found.at_least and found.blocks.mean == pytest.approx(1.5)
    assert advantage(rival, champion, 4.0) is None  # never so near


# Records, and the run


def record(contender: str = "x", prompt: str = "one", phase: str = "test", **changes: object) -> Record:
    values = dict(work=0.25, attentions=0.25, seconds=1.0, plain_seconds=4.0, psnr=40.0, ssim=0.9, lpips=None)
    return Record(phase, contender, prompt, **values | changes)


def contender(method: str, setting: str = "s", library: str = OURS) -> Contender:
    return Contender(library, method, setting, lambda pipe: contextlib.nullcontext())


def test_records_outlive_a_run_that_was_killed_while_writing(tmp_path):
    file = tmp_path / "new" / "records.jsonl"
    Records(file, {"steps": 50}).add([record(contender("m").name)])
    with file.open("a") as torn:
        torn.write('{"phase": "te')
    again = Records(file, {"steps": 50})
    assert again.records == [record(contender("m").name)]
    assert again.has(TASK, contender("m")) and not again.has(TASK, contender("other"))


def test_records_of_something_else_are_not_mixed_in(tmp_path):
    Records(tmp_path / "r.jsonl", {"steps": 50})
    with pytest.raises(UserError, match="--records"):
        Records(tmp_path / "r.jsonl", {"steps": 28})


def test_a_drawing_is_compared_with_the_uncached_one(tiny_pipe):
    def attach(config: h2cache.CacheConfig, pipe: FluxPipeline) -> h2cache.Handle:
        return h2cache.apply(pipe, config)

    half = Contender(OURS, "every second", "", partial(attach, TaylorSeerConfig(2, granularity="stage")))
    with Bench(tiny_pipe, [OURS], CALL) as bench:
        (records,) = bench.measure(TASK, [half, contender("nothing")])
    found = {each.contender: each for each in records}
    same, cached = found[contender("nothing").name], found[half.name]
    assert same.work == same.attentions == same.ssim == 1 and same.psnr == float("inf")
    assert cached.work == pytest.approx(0.6) and 10 < cached.psnr < 90  # 3 of warm-up, 3 of the other 7
    assert cached.seconds > 0 and cached.plain_seconds == same.plain_seconds > 0


def test_a_method_that_leaves_something_behind_is_an_error(tiny_pipe):
    @contextlib.contextmanager
    def leaving(pipe: FluxPipeline):
        yield
        pipe.transformer.proj_out.bias.data += 0.3

    messy = Contender("messy", "m", "s", leaving)
    with (
        Bench(tiny_pipe, [OURS, "messy"], CALL) as bench,
        pytest.raises(RuntimeError, match=r"messy: m, s: .* removed"),
    ):
        list(bench.measure(TASK, [messy]))


def test_settings_next_to_the_speedups_are_selected_and_every_plan():
    works = {"a": 0.6, "b": 0.4, "c": 0.3, "d": 0.2, "e": 0.12}
    everyone = [contender(method, setting) for method in ("m", "plan") for setting in works]
    everyone += [contender("slow", "a"), contender("slow", "b")]
    rows = [
        record(each.name, work=works[each.setting], psnr=60 * works[each.setting], phase="tune") for each in everyone
    ]
    found = frontier_report.methods(rows, everyone, "tune")
    kept = {(each.method, each.setting) for each in pareto.select(found, everyone)}
    assert {setting for method, setting in kept if method == "m"} == {"b", "c", "d", "e"}
    assert {setting for method, setting in kept if method == "plan"} == set(works)
    assert {setting for method, setting in kept if method == "slow"} == {"a", "b"}  # never 3x: its two fastest
    assert pareto.champion_of(found, found).name == "plan"
    without = [method for method in found if method.name != "plan"]
    assert pareto.champion_of(without, without).name == "m"


def test_what_is_far_outside_of_the_speedups_is_swept_on_one_prompt_only():
    works = {"1.2x": 1 / 1.2, "2x": 0.5, "4x": 0.25, "20x": 0.05}
    everyone = [contender(method, setting) for method in ("m", "plan") for setting in works]
    everyone += [contender("slow", "1.2x"), contender("slow", "2x")]
    found = frontier_report.methods(
        [record(each.name, work=works[each.setting], psnr=60 * works[each.setting]) for each in everyone],
        everyone,
        "test",
    )
    kept = {(each.method, each.setting) for each in pareto.promising(found, everyone)}
    assert kept == {("m", "2x"), ("m", "4x"), ("slow", "1.2x"), ("slow", "2x"), *(("plan", each) for each in works)}


def test_thinning_keeps_plans():
    everyone = [contender("m", str(i)) for i in range(9)] + [contender("plan", str(i)) for i in range(3)]
    assert [each.setting for each in pareto.thinned(everyone, 4)] == ["0", "4", "8", "0", "1", "2"]


def test_tuning_and_test_prompts_are_disjoint():
    lines = pareto.PROMPTS.read_text().splitlines()
    test, tune = pareto.tasks("test", range(24)), pareto.tasks("tune", range(len(lines) - 8, len(lines)))
    assert not {task.prompt for task in test} & {task.prompt for task in tune}
    assert test[5].seed == 5 and json.loads(lines[5])["prompt"] == test[5].prompt


# What is written


@pytest.fixture
def two_methods() -> tuple[list[Record], list[Contender]]:
    everyone = [
        contender(method, setting, library)
        for library, method in ((OURS, "plan"), ("diffusers", "Rival"))
        for setting in ("slow", "fast")
    ]
    work, psnr = {"slow": 0.5, "fast": 0.125}, {"plan": 5.0, "Rival": 0.0}
    rows = [
        record(
            each.name,
            prompt,
            work=work[each.setting],
            seconds=4 * work[each.setting],
            psnr=20 + 40 * work[each.setting] + psnr[each.method] + offset,
        )
        for each in everyone
        for prompt, offset in (("one", 0.0), ("two", 2.0), ("three", 4.0))
    ]
    return rows, everyone


def cells_of(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.split("|")][2:-1]


def test_the_table_has_psnr_at_equal_work(two_methods):
    """At 4x halfway between 40 and 25, 2 more on average over prompts, and the plan 5 more; the best comes first."""
    plan, rival = frontier_report.methods(*two_methods, "test")
    text = frontier_report.table([rival, plan])
    assert text.splitlines()[2].startswith("| plan |")
    psnr_3, psnr_4, psnr_6, ssim, wall, fastest = cells_of(text, "diffusers Rival")
    assert psnr_4.startswith("34.5 (29.5 to 39.5") and psnr_3 > psnr_4 > psnr_6
    assert (ssim, wall, fastest) == ("0.9000", "4.00x", "8.0x, 27.0 dB")


def test_what_does_not_get_so_fast_has_empty_cells(two_methods):
    plan, rival = frontier_report.methods(*two_methods, "test")
    slow = frontier_report.Method(rival.library, "Slow", [each for each in rival.points if each.setting == "slow"])
    assert cells_of(frontier_report.table([plan, slow]), "diffusers Slow") == ["", "", "", "", "", "2.0x, 42.0 dB"]
    assert "Slow" not in frontier_report.gains([plan, rival, slow], plan)


def test_gains_are_paired(two_methods):
    """Prompts differ by 2 dB, the plan is 5 ahead on each of them: an interval without width."""
    plan, rival = frontier_report.methods(*two_methods, "test")
    text = frontier_report.gains([plan, rival], plan)
    assert cells_of(text, "diffusers Rival")[:3] == ["+5.0 (+5.0 to +5.0)"] * 3 and "| plan |" not in text


def test_a_prompt_without_a_record_leaves_the_setting_out(two_methods):
    records, everyone = two_methods
    plan, _ = frontier_report.methods(records[1:], everyone, "test")
    assert [each.setting for each in plan.points] == ["fast"]


def test_the_verdict_is_at_the_psnr_of_the_best_rival(two_methods):
    """5 dB are a third of what lies between 2x and 8x, 15 dB: 4 ** (1 / 3) = 1.59 times fewer blocks."""
    plan, rival = frontier_report.methods(*two_methods, "test")
    text = frontier_report.verdict([plan, rival], plan)
    assert (
        text.startswith("The best other peer at 4x is diffusers Rival, with 34.5 dB.") and text.count("The best") == 1
    )
    assert "computes 1.59 (1.59 to 1.59) times fewer blocks at that PSNR" in text


def test_what_is_only_known_to_be_faster_is_marked(two_methods):
    """The plan's 32 dB at 8x are more than the rival's 34.5 - 5 dB would be."""
    plan, rival = frontier_report.methods(*two_methods, "test")
    lower = [replace(each, psnr=each.psnr - 5) for each in rival.points]
    weak = frontier_report.Method(rival.library, "Weak", lower)
    assert "computes ≥ 2.00 (2.00 to 2.00) times fewer blocks at its fastest" in frontier_report.verdict(
        [plan, weak], plan
    )
    assert cells_of(frontier_report.gains([plan, weak], plan), "diffusers Weak")[3].startswith("≥ 2.00")


def test_every_setting_is_a_row_of_the_csv(two_methods, tmp_path):
    frontier_report.write_csv(*two_methods, tmp_path / "all.csv")
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [row["setting"] for row in rows] == ["slow", "fast"] * 2
    assert (
        rows[0]["psnr"] == "47" and rows[0]["work"] == "0.5" and rows[0]["wall_speedup"] == "2" and not rows[0]["lpips"]
    )


def test_the_picture_is_drawn(two_methods, tmp_path):
    found = frontier_report.methods(*two_methods, "test")
    frontier_report.draw(found, found[0], tmp_path / "pictures" / "p.png")
    with Image.open(tmp_path / "pictures" / "p.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    orange = tuple(bytes.fromhex(frontier_report.CHAMPION_COLOUR[1:]))
    assert picture.width > 1000 and (pixels == orange).all(axis=-1).sum() > 300
