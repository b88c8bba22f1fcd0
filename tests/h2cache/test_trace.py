"""The record: one row per call x sample x stage, what each column holds, and what the summary adds up."""

import math

import pandas
import pytest
import torch
from loops import attentions, denoise, denoising, executions
from methods_under_test import METHODS, measures, runs_first_block

import h2cache
from h2cache import Decision, H2CacheConfig
from h2cache.baselines import BlockCacheConfig
from h2cache.trace import KEPT_RUNS, Row, Trace

COLUMNS = [
    "run",
    "step",
    "timestep",
    "context",
    "sample",
    "stage",
    "diff",
    "threshold",
    "decision",
    "blocks_computed",
    "sigma",
]
FLAT_AND_ALWAYS = H2CacheConfig(tau1=math.inf, tau2=math.inf, hierarchical=False)


def decisions(handle: h2cache.Handle, stage: str = "structure", sample: int = 0) -> str:
    """First letters, step by step: w(armup), c(ompute), h(it), f(orced)."""
    return "".join(row.decision[0] for row in handle.trace if row.stage == stage and row.sample == sample)


def test_columns_and_dtypes(transformer):
    with h2cache.apply(transformer, H2CacheConfig(tau1=0.3)) as handle:
        denoise(transformer, batch=2)
    frame = handle.trace.to_pandas()
    assert list(frame.columns) == COLUMNS
    for name in ("run", "step", "sample", "blocks_computed"):
        assert pandas.api.types.is_integer_dtype(frame[name]), name
    for name in ("timestep", "diff", "threshold", "sigma"):
        assert pandas.api.types.is_float_dtype(frame[name]), name
    for name in ("context", "stage", "decision"):
        assert {type(value) for value in frame[name]} == {str}, name
    assert set(frame["decision"]) <= {"warmup", "compute", "hit", "forced"}


def test_an_empty_trace_has_its_columns_and_a_summary(transformer):
    with h2cache.apply(transformer, H2CacheConfig()) as handle:
        frame = handle.trace.to_pandas()
    assert list(frame.columns) == COLUMNS
    assert frame.empty
    summary = handle.summary()
    assert (summary["runs"], summary["steps"], summary["computed_fraction"], summary["max_speedup"]) == (0, 0, 1.0, 1.0)


@pytest.mark.parametrize("config", METHODS)
def test_one_row_for_each_call_sample_and_stage(transformer, config):
    with h2cache.apply(transformer, config) as handle:
        denoise(transformer, steps=5, batch=2)
        denoise(transformer, steps=4)
    frame = handle.trace.to_pandas()
    stages = list(handle.summary()["stages"])
    expected = {(0, step, sample, stage) for step in range(5) for sample in range(2) for stage in stages}
    expected |= {(1, step, 0, stage) for step in range(4) for stage in stages}
    found = list(zip(frame["run"], frame["step"], frame["sample"], frame["stage"], strict=True))
    assert len(found) == len(expected)
    assert set(found) == expected
    assert set(frame["context"]) == {"cond"}


def test_timesteps_are_in_the_model_s_unit(transformer):
    with h2cache.apply(transformer, BlockCacheConfig()) as handle:
        denoise(transformer, steps=4)
    assert handle.trace.to_pandas()["timestep"].tolist() == pytest.approx([1000, 750, 500, 250])


@pytest.mark.parametrize("config", METHODS)
def test_diff_is_there_where_something_was_measured(transformer, config):
    """Compared and found below the threshold, or not below; warm-up, forced steps and schedules measure nothing."""
    with h2cache.apply(transformer, config) as handle:
        denoise(transformer, batch=2)
    for row in handle.trace:
        measured = measures(config) and row.decision not in (Decision.WARMUP, Decision.FORCED)
        assert (row.diff is not None) == measured
        assert math.isnan(row.threshold) != measures(config)
        last_of_teacache = not runs_first_block(config) and row.step == 11  # computes, whatever was measured
        if measured and not last_of_teacache:
            assert row.decision == (Decision.HIT if row.diff < row.threshold else Decision.COMPUTE)
    frame = handle.trace.to_pandas()
    assert frame["diff"].tolist() == pytest.approx(
        [math.nan if r.diff is None else r.diff for r in handle.trace], nan_ok=True
    )


@pytest.mark.parametrize("config", METHODS)
def test_blocks_computed_is_what_was_computed(transformer, config):
    """Where a method skips inside blocks their norms run throughout, but attention and MLPs are what costs."""
    with h2cache.apply(transformer, config) as handle, attentions(transformer) as calls:
        denoise(transformer, batch=3)
    recorded = handle.trace.to_pandas().groupby("step")["blocks_computed"].sum().tolist()
    assert recorded == [sum(blocks) for blocks in calls]


def test_the_summary_by_hand(transformer):
    """Two double and three single blocks, three steps: 15 blocks. Step 1 hits in both stages and runs their first
    blocks, 2 of 5; the limit of one hit in a row makes step 2 compute. 5 + 2 + 5 = 12 of 15 blocks, so a speedup of at
    most 15 / 12."""
    config = H2CacheConfig(tau1=math.inf, max_consecutive_hits=1)
    with h2cache.apply(transformer, config) as handle:
        denoise(transformer, steps=3)
    assert handle.summary() == {
        "runs": 1,
        "steps": 3,
        "stages": {
            "structure": {"warmup": 1, "compute": 1, "hit": 1, "forced": 0},
            "detail": {"warmup": 1, "compute": 1, "hit": 0, "forced": 1},
        },
        "computed_fraction": pytest.approx(12 / 15),
        "max_speedup": pytest.approx(15 / 12),
    }


def test_the_summary_counts_blocks_that_no_stage_may_skip(transformer):
    """Structure only: of 2 + 3 blocks a hit saves one, so four steps with three hits compute 17 of 20."""
    with h2cache.apply(transformer, H2CacheConfig(tau1=math.inf, stages="structure")) as handle:
        denoise(transformer, steps=4)
    assert handle.summary()["computed_fraction"] == pytest.approx(17 / 20)
    assert list(handle.summary()["stages"]) == ["structure"]


def test_the_summary_adds_runs_and_samples(transformer):
    with h2cache.apply(transformer, BlockCacheConfig(threshold=math.inf)) as handle:
        denoise(transformer, steps=2, batch=3)
        denoise(transformer, steps=4)
    summary = handle.summary()
    assert (summary["runs"], summary["steps"]) == (2, 6)
    assert summary["stages"]["network"] == {"warmup": 4, "compute": 0, "hit": 6, "forced": 0}
    assert summary["computed_fraction"] == pytest.approx((4 * 5 + 6 * 1) / 50)


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_warmup_steps(transformer, warmup):
    with h2cache.apply(transformer, H2CacheConfig(tau1=math.inf, warmup_steps=warmup)) as handle:
        denoise(transformer, steps=7)
    assert decisions(handle, "structure") == "w" * warmup + "h" * (7 - warmup)
    assert decisions(handle, "detail") == "w" * warmup + "f" * (7 - warmup)


def test_a_run_shorter_than_the_warm_up_only_computes(transformer):
    with h2cache.apply(transformer, H2CacheConfig(tau1=math.inf, warmup_steps=9)) as handle:
        denoise(transformer, steps=4)
    assert handle.summary()["computed_fraction"] == 1.0


LIMITS = [(1, "whchchchc"), (2, "whhchhchh"), (3, "whhhchhhc"), (None, "whhhhhhhh")]


@pytest.mark.parametrize(("limit", "expected"), LIMITS)
def test_max_consecutive_hits(transformer, limit, expected):
    with h2cache.apply(transformer, FLAT_AND_ALWAYS.updated(max_consecutive_hits=limit)) as handle:
        denoise(transformer, steps=9)
    assert decisions(handle, "structure") == expected
    assert decisions(handle, "detail") == expected


def test_forced_hits_count_as_hits_in_a_row(transformer):
    """Detail is forced at steps 1 and 2; with a limit of 2 it computes at step 3, as structure does."""
    config = H2CacheConfig(tau1=math.inf, tau2=math.inf, max_consecutive_hits=2)
    with h2cache.apply(transformer, config) as handle:
        denoise(transformer, steps=7)
    assert decisions(handle, "structure") == "whhchhc"
    assert decisions(handle, "detail") == "wffcffc"


def test_an_update_takes_effect_on_the_next_call(transformer):
    """Thresholds change in the middle of a run; what it remembers still serves, so it hits at once."""
    with h2cache.apply(transformer, BlockCacheConfig(threshold=-1)) as handle:
        for step, _ in enumerate(denoising(transformer, steps=6)):
            if step == 2:
                handle.update(threshold=math.inf)
            if step == 3:
                handle.update(threshold=-1)
    assert decisions(handle, "network") == "wcchcc"
    assert [row.threshold for row in handle.trace] == [-1, -1, -1, math.inf, -1, -1]
    assert handle.summary()["runs"] == 1


@pytest.mark.parametrize("change", [dict(pool1=4), dict(forecast="taylor"), dict(stages="structure")], ids=str)
def test_an_update_that_memory_cannot_serve_computes_its_next_step(transformer, change):
    with h2cache.apply(transformer, H2CacheConfig(tau1=math.inf)) as handle, executions(transformer) as calls:
        for step, _ in enumerate(denoising(transformer, steps=6)):
            if step == 2:
                handle.update(**change)
    computed = [blocks[:2] == [1, 1] for blocks in calls]
    assert computed == [True, False, False, True, False, False]


def test_the_trace_stays_readable_after_removal_and_can_be_cleared(transformer):
    with h2cache.apply(transformer, BlockCacheConfig()) as handle:
        denoise(transformer, steps=3)
    denoise(transformer, steps=3)
    assert len(handle.trace) == len(handle.trace.to_pandas()) == 3
    handle.trace.clear()
    assert len(handle.trace) == 0
    assert handle.summary()["runs"] == 0


def test_a_trace_that_is_cleared_in_the_middle_of_a_run_has_the_rest_of_it(transformer):
    with h2cache.apply(transformer, BlockCacheConfig(threshold=9.0)) as handle:
        for step, _ in enumerate(denoising(transformer, steps=5)):
            if step == 2:
                handle.trace.clear()
    assert [row.step for row in handle.trace] == [3, 4]
    assert (handle.summary()["runs"], handle.summary()["steps"]) == (1, 2)
    assert handle.summary()["computed_fraction"] == pytest.approx(1 / 5)


def test_only_the_last_runs_are_kept():
    """A service that runs for weeks does not grow: the oldest runs fall out, the summary is over those that stay."""
    trace = Trace()
    trace.expect(["network"])
    for _ in range(KEPT_RUNS + 10):
        run = trace.begin_run({"network": 5}, total_blocks=5)
        trace.rows_of(run).append(Row(run, 0, 1000.0, "cond", 0, "network", None, 0.1, Decision.WARMUP, 5))
    assert len(trace) == KEPT_RUNS
    assert next(iter(trace)).run == 10
    assert trace.summary()["runs"] == KEPT_RUNS


def test_rows_hold_no_graph_and_no_features(transformer):
    """Plain numbers and words, so that a long trace holds no tensors of the model."""
    with h2cache.apply(transformer, H2CacheConfig(tau1=0.3)) as handle:
        denoise(transformer, steps=3)
    assert not any(isinstance(value, torch.Tensor) for row in handle.trace for value in row)
