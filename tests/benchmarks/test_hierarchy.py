"""`benchmarks.hierarchy`: stages run apart exactly, weights fitted once and replayed, equal work, a seeded search."""

import random
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loops import attentions
from tiny import TEXT_TOKENS

from benchmarks.count import WorkCounter
from benchmarks.hierarchy import __main__ as command
from benchmarks.hierarchy.experiment import Found, computed_steps, work_of_stages
from benchmarks.hierarchy.plans import ALL_CORRECTED, ONE_STAGE, TWO_STAGES, Level, Work, drawn
from benchmarks.hierarchy.report import table
from benchmarks.hierarchy.search import Counted, PlanSearch, searched, with_level
from benchmarks.hierarchy.simulation import Fitted, Given, Simulation
from benchmarks.hierarchy.stages import evaluate, stage
from h2cache.plans import record
from h2cache.plans import simulate as one_stage
from h2cache.plans.conditions import Conditions
from h2cache.plans.plan import Plan

CALL = dict(height=32, width=64, guidance_scale=3.5, max_sequence_length=TEXT_TOKENS)
STEPS = 9
ALL, SOME = TWO_STAGES[2], ALL_CORRECTED[1]
SIGNS = {level.sign: level for level in Level}
FAMILIES = [ONE_STAGE, *TWO_STAGES, *ALL_CORRECTED]


def levels(signs: str) -> tuple[Level, ...]:
    return tuple(SIGNS[sign] for sign in signs)


@pytest.fixture
def runs(tiny_pipe):
    return record(tiny_pipe, ["a red sign", "TEA"], STEPS, seed=0, batch_size=2, **CALL)


@pytest.fixture
def others(tiny_pipe):
    return record(tiny_pipe, ["a blue label", "MILK", "a shop"], STEPS, seed=7, batch_size=3, **CALL)


# Stages apart


def test_with_both_stages_computed_it_is_the_plain_model_to_the_bit(runs):
    assert torch.equal(evaluate(runs, 3, runs.latents[2]).output, runs.compute(3, runs.latents[2]))


@pytest.mark.parametrize("given", [("structure",), ("detail",), ("structure", "detail")])
def test_a_stage_s_own_residual_stands_in_for_it(runs, given):
    whole = evaluate(runs, 3, runs.latents[2])
    again = evaluate(runs, 3, runs.latents[2], **{name: getattr(whole, name) for name in given})
    torch.testing.assert_close(again.output, whole.output, rtol=1e-4, atol=1e-5)
    for name in ("structure", "detail"):
        for a, b in zip(getattr(again, name), getattr(whole, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_stage_that_is_given_runs_none_of_its_blocks(runs):
    whole = evaluate(runs, 3, runs.latents[2])
    with attentions(runs.model) as calls:
        evaluate(runs, 3, runs.latents[2], structure=whole.structure)
        evaluate(runs, 3, runs.latents[2], detail=whole.detail)
    assert calls == [[0, 0, 2, 2, 2], [2, 2, 0, 0, 0]]


def test_another_residual_makes_another_output(runs):
    """So that the tests above do not pass by ignoring what is given."""
    here, there = (evaluate(runs, 3, runs.latents[step]) for step in (2, 7))
    for name in ("structure", "detail"):
        other = evaluate(runs, 3, runs.latents[2], **{name: getattr(there, name)})
        assert (other.output - here.output).norm() > 1e-2 * here.output.norm()


def test_the_blocks_are_left_as_they_were(runs):
    blocks = [*runs.model.transformer_blocks, *runs.model.single_transformer_blocks]
    assert not any("forward" in vars(block) for block in blocks)  # nor by the tests before this one
    worn = blocks[0].forward = blocks[0].forward  # what another hook may have put there
    before = [dict(vars(block)) for block in blocks]
    try:
        with pytest.raises(RuntimeError), stage(blocks, None):
            runs.compute(0, runs.latents[0][:, :, :1])
        assert [dict(vars(block)) for block in blocks] == before and blocks[0].forward is worn
    finally:
        del blocks[0].forward


# Runs of plans


def test_a_one_stage_plan_is_what_calibration_simulates(runs):
    plan = levels("#.#..#...")
    ours = Simulation(runs, Fitted(runs)).run(plan)
    theirs = one_stage.Simulation(runs, history=3, ridge=1e-4).run((0, 2, 5))
    assert torch.equal(ours.latents, theirs.latents)
    assert {step: ours.weights[step].output for step in theirs.weights} == theirs.weights


PLANS = ["#.#d.s#ds", "#ds.#.sd.", "#-#d-s#-s"]


@pytest.mark.parametrize("signs", PLANS)
def test_weights_are_replayed_as_they_were_fitted(runs, signs):
    fitted = Simulation(runs, Fitted(runs), SOME.corrected).run(levels(signs))
    again = Simulation(runs, Given(fitted.weights), SOME.corrected).run(levels(signs))
    assert torch.equal(again.latents, fitted.latents) and again.weights == fitted.weights


@pytest.mark.parametrize("signs", PLANS)
def test_on_other_prompts_nothing_is_fitted_and_only_the_plan_is_computed(runs, others, signs):
    weights = Simulation(runs, Fitted(runs), ALL.corrected).run(levels(signs)).weights
    work, alone = work_of_stages(others, budget=1), others.first(1)
    with WorkCounter(alone.model) as counter:
        end = Simulation(alone, Given(weights), ALL.corrected).run(levels(signs))
    assert end.weights == weights
    assert counter.multiply_adds == work.budget - work.left(levels(signs))


def test_weights_sum_to_one(runs):
    for each in Simulation(runs, Fitted(runs), SOME.corrected).run(levels("#-#d-s#-s")).weights.values():
        for weights in (each.structure, each.detail, each.output):
            assert not weights or sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("signs", ["#.#.#.d", "#.#.#.s"])
def test_a_corrected_step_ends_nearer_to_the_uncached_run(runs, signs):
    step = len(signs)
    plan = levels(signs + "." * (STEPS - step))
    errors = []
    for corrected in (frozenset(), ALL.corrected):
        simulation = Simulation(runs, Fitted(runs), corrected)
        simulation.run(plan)
        errors.append((simulation._states[step].latents - runs.latents[step]).norm())
    assert errors[1] < errors[0]


def test_only_a_stage_that_was_computed_is_remembered(runs):
    simulation = Simulation(runs, Fitted(runs))
    simulation.run(levels("#ds-....."))
    kept = [(len(state.structures), len(state.details), len(state.outputs)) for state in simulation._states]
    assert kept[:5] == [(0, 0, 0), (1, 1, 1), (1, 2, 2), (2, 2, 3), (2, 2, 3)]


def test_a_plan_that_shares_its_beginning_is_run_on_from_there(runs):
    simulation = Simulation(runs, Fitted(runs))
    simulation.run(levels("#..d..#.."))
    with attentions(runs.model) as calls:
        end = simulation.run(levels("#..d...#."))
    assert len(calls) == 1
    assert torch.equal(end.latents, Simulation(runs, Fitted(runs)).run(levels("#..d...#.")).latents)


# Work


def test_the_stages_work_is_all_the_work(runs):
    work = work_of_stages(runs, budget=3)
    alone = runs.first(1)
    with WorkCounter(runs.model) as counter:
        alone.compute(0, alone.latents[0])
    assert work.structure + work.detail == counter.multiply_adds and work.budget == 3 * counter.multiply_adds
    assert work.structure > 0 < work.detail
    assert work.left(levels("#ds.-#")) == 0
    assert work.left(levels("####")) == -counter.multiply_adds


# Families and the search

WORK = Work(structure=10, detail=21, budget=6 * 31)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_candidate_is_of_the_family_and_keeps_the_budget(family):
    """And uses it, up to what a stage costs."""
    asked = []
    chance = random.Random(0)
    search = PlanSearch(family, WORK, Counted(lambda plan: asked.append(plan) or chance.random()), seed=0)
    whole = family.whole(30, range(6))
    searched(search, [search.converted(whole, 10) if family.partial else [whole]], 400)
    raises = [b - a for a in map(WORK.of, family.levels) for b in map(WORK.of, family.levels) if b > a]
    for plan in (*asked, *family.handmade(30, WORK)):
        assert len(plan) == 30 and plan[0] is Level.EVERYTHING and set(plan) <= set(family.levels)
        assert family.has(plan) and WORK.left(plan) >= 0
    assert all(WORK.left(plan) <= min(raises) for plan in asked)
    assert len(set(asked)) > 40


def test_what_a_family_is_named_after_is_in_its_plans():
    assert not ALL.has(levels("#..#")) and ALL.has(levels("#.d#")) and ONE_STAGE.has(levels("#..#"))


def test_the_search_finds_a_hidden_plan():
    hidden = levels("#..d...s.#...d.#..d.s......#..")
    work = Work(1, 2, -Work(1, 2, 0).left(hidden))

    def likeness(plan):
        return 3.0 * sum(a is b for a, b in zip(plan, hidden, strict=True))

    search = PlanSearch(ALL, work, Counted(likeness), seed=1)
    start = ALL.handmade(30, work)
    best = searched(search, [start], 1500)
    assert likeness(best) >= likeness(hidden) - 12 > max(map(likeness, start))


def test_as_many_plans_are_scored_as_asked_and_the_seed_decides():
    starts = ALL.handmade(30, WORK)

    def score(plan):
        return random.Random(drawn(plan)).random() + (plan not in starts)

    def find(seed):
        search = PlanSearch(ALL, WORK, Counted(score), seed)
        return searched(search, [starts], 60), search.score.asked

    (first, asked), again, other = find(0), find(0), find(1)
    assert (first, asked) == again and first != other[0] and 50 <= asked <= 60


def test_handmade_plans_compute_the_stage_alone_in_a_part_of_their_steps():
    for plan in TWO_STAGES[0].handmade(30, WORK):
        counts = plan.count(Level.DETAIL), plan.count(Level.EVERYTHING)
        assert 0.15 < counts[0] / sum(counts) < 0.6
        assert not any(a is b is Level.DETAIL for a, b in pairwise(each for each in plan if each.detail))


def test_neighbours_are_one_exchange_away():
    plan = levels("#.d..s#")
    found = [drawn(each) for each in PlanSearch(ALL, WORK, Counted(len), 0).neighbours(plan)]
    assert found == ["#.d.s.#", "#d...s#", "#..d.s#", "#.d..#s", "#.s..d#"]
    assert drawn(with_level(plan, 1, Level.DETAIL)) == "#dd..s#"


# The command


def test_a_calibrated_plan_is_a_start_where_it_fits(tmp_path):
    file = tmp_path / "plan.json"
    assert computed_steps(file, 4, 2) is None
    Plan(Conditions(steps=4), (0, 2), {1: (1.0,), 3: (2.0, -1.0)}).save(file)
    assert computed_steps(file, 4, 2) == (0, 2)
    assert computed_steps(file, 4, 3) is None and computed_steps(file, 5, 2) is None


def test_the_table_has_means_and_paired_differences():
    work = Work(1, 2, 9)
    found = [
        Found(ONE_STAGE, levels("#.##"), 9, 5, np.array([40.0, 42.0]), np.array([30.0, 40.0])),
        Found(ALL, levels("#ds#"), 9, 7, np.array([50.0, 51.0]), np.array([31.0, 42.0])),
    ]
    first, second = (line for line in table(found, work, 4).splitlines() if line.startswith(("| every", "| or")))
    assert first == "| everything or nothing | 41.00 | 35.00 |  | 3, 0, 0 | 3.00 steps | 5 |"
    half = 12.706 / 2  # Student's t for one degree of freedom, times the standard error of 1 and 2
    assert f"| 50.50 | 36.50 | +1.50 ({1.5 - half:+.2f} to {1.5 + half:+.2f}) | 2, 1, 1 | 3.00 steps | 7 |" in second


@pytest.fixture
def page(tiny_pipe, tmp_path, monkeypatch):
    """A page to write into, and the tiny pipeline in the place of the embedded one."""
    model = SimpleNamespace(call_arguments={**CALL, "num_inference_steps": STEPS})
    monkeypatch.setattr(command, "instantiate", lambda *args, **kwargs: model)
    monkeypatch.setattr(command, "load_pipeline", lambda model: tiny_pipe)
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- hierarchy -->\nold\n<!-- /hierarchy -->\nafter\n")
    return file


def test_the_command_writes_its_tables_and_repeats_itself(page):
    texts = []
    for _ in range(2):
        command.main(["--prompts", "2", "--rounds", "4", "--search", "1", "--fit", "2", "--page", str(page)])
        texts.append(page.read_text())
    assert texts[0] == texts[1] and "old" not in texts[0]
    text = texts[0]
    assert text.startswith("before\n<!-- hierarchy -->\n`python -m benchmarks.hierarchy --prompts 2 --rounds 4")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0][2:] for row in rows] == [family.name for family in FAMILIES]
    assert " to " not in rows[0] and all(" to " in row for row in rows[1:])
    plans = text.split("```text\n")[1].split("\n```")[0].splitlines()
    for plan, row, family in zip(plans, rows, FAMILIES, strict=True):
        assert family.has(levels(plan[:STEPS])) and plan[STEPS:].strip() == family.name
        assert f"| {plan.count('#')}, {plan.count('s', 0, STEPS)}, {plan.count('d', 0, STEPS)} |" in row


def test_the_search_s_prompts_must_be_among_the_fit_s(capsys):
    with pytest.raises(SystemExit):
        command.main(["--search", "3", "--fit", "2"])
    assert "--search 3" in capsys.readouterr().err
