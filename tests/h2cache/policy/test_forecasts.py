"""What stands in for a skipped stage: polynomials in the steps since it was last computed, alone and in the engine."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import denoise
from scipy.special import eval_hermite

import h2cache
from h2cache import H2CacheConfig
from h2cache.policy.forecasts import Features, Hermite, Taylor, advance_terms, extrapolate


def streams(image: float, text: float = 0.0) -> Features:
    return torch.full((1, 2, 3), image, dtype=torch.float64), torch.full((1, 1, 3), text, dtype=torch.float64)


def forecast(basis, computed_steps: list[int], feature, ahead: int) -> float:
    """The forecast of `feature(step)`, `ahead` steps after the last of `computed_steps`, from its values there."""
    terms: list[Features] = []
    last = 0
    for step in computed_steps:
        terms = advance_terms(terms, streams(feature(step)), step - last, basis.order)
        last = step
    return extrapolate(terms, basis.coefficients(ahead), base=streams(0.0))[0][0, 0, 0].item()


def test_reuse_is_the_last_residual():
    assert Taylor(0).coefficients(7) == [1.0]
    assert forecast(Taylor(0), [0, 3, 4], lambda step: step**2, ahead=5) == 16.0


@pytest.mark.parametrize("basis", [Taylor(1), Hermite(1, math.sqrt(0.5))], ids=["taylor", "hermite at sqrt(1/2)"])
@pytest.mark.parametrize("steps", [[0, 1], [0, 4], [0, 1, 3], [2, 3, 10, 11, 17]])
@pytest.mark.parametrize("ahead", [1, 2, 6])
def test_order_one_is_exact_on_lines_however_irregular_the_computed_steps(basis, steps, ahead):
    """The guard on Hermite's sign: H_1(x) = 2x, so sigma * H_1(sigma x) = 2 sigma^2 x = x at sigma = sqrt(1/2).

    A basis evaluated at -x would give the line's value at -x, further off than plain reuse."""

    def line(step):
        return 3.0 - 2.0 * step

    assert forecast(basis, steps, line, ahead) == pytest.approx(line(steps[-1] + ahead))


@given(
    slope=st.floats(-3, 3),
    start=st.floats(-3, 3),
    gaps=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    ahead=st.integers(1, 9),
)
def test_taylor_is_exact_on_any_line(slope, start, gaps, ahead):
    steps = [sum(gaps[:k]) for k in range(len(gaps) + 1)]
    exact = start + slope * (steps[-1] + ahead)
    assert forecast(Taylor(1), steps, lambda step: start + slope * step, ahead) == pytest.approx(exact, abs=1e-9)


def test_order_two_on_a_parabola():
    """i^2 at steps 0, 1, 2: differences 4, 3, 2. They lag: D_1 is the slope half a step ago, where a Taylor series has
    the slope now. So the forecast is 4 + 3x + x^2, and not (2 + x)^2: the paper's formula is exact for lines only."""
    terms: list[Features] = []
    for step in (0, 1, 2):
        terms = advance_terms(terms, streams(step**2), 1, order=2)
    assert [term[0][0, 0, 0].item() for term in terms] == [4.0, 3.0, 2.0]
    assert forecast(Taylor(2), [0, 1, 2], lambda step: step**2, ahead=3) == 4 + 3 * 3 + 2 * 3**2 / 2


@pytest.mark.parametrize("order", [2, 3, 4])
def test_higher_orders_use_the_paper_s_recursion(order):
    """`D_{k+1} = (D_k - previous D_k) / (i - previous i)`, spelled out on irregular steps."""
    steps = [0, 1, 3, 7, 8]

    def value(step):
        return math.sin(step)

    previous: list[float] = []
    for number, step in enumerate(steps):
        gap = step - steps[number - 1] if number else None
        current = [value(step)]
        for k in range(min(order, len(previous))):
            current.append((current[k] - previous[k]) / gap)
        previous = current
    expected = sum(d * 2**k / math.factorial(k) for k, d in enumerate(previous))
    assert forecast(Taylor(order), steps, value, ahead=2) == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("x", [1, 2, 5])
def test_hermite_s_coefficients(sigma, x):
    """`sigma^n H_n(sigma x) / n!` with the physicists' polynomials, as SciPy knows them; the zeroth is 1."""
    expected = [sigma**n * eval_hermite(n, sigma * x) / math.factorial(n) for n in range(6)]
    assert Hermite(5, sigma).coefficients(x) == pytest.approx(expected)
    assert Hermite(5, sigma).coefficients(x)[0] == 1.0


def test_hermite_looks_ahead():
    """The first coefficient is +2 sigma^2 x: a feature that grows is forecast above its last value."""
    assert Hermite(1, 0.5).coefficients(4)[1] == pytest.approx(2.0)
    assert forecast(Hermite(1, 0.5), [0, 1], lambda step: step, ahead=4) == pytest.approx(1 + 2.0)


def test_order_ramps_up_with_history():
    """After one computed step there is only reuse, after two a line, and no more terms than the order asks."""
    terms: list[Features] = []
    for computed, expected in enumerate([1, 2, 3, 3, 3], start=1):
        terms = advance_terms(terms, streams(computed**2), 1, order=2)
        assert len(terms) == expected
    assert forecast(Taylor(2), [0], lambda step: 5.0, ahead=3) == 5.0


def test_both_streams_are_forecast():
    terms = advance_terms([], streams(1.0, 10.0), 0, 1)
    terms = advance_terms(terms, streams(2.0, 30.0), 1, 1)
    image, text = extrapolate(terms, Taylor(1).coefficients(2), base=streams(100.0, 1000.0))
    assert image.unique().tolist() == [100 + 2 + 2 * 1]
    assert text.unique().tolist() == [1000 + 30 + 2 * 20]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_forecast_keeps_the_streams_dtype(dtype):
    one = torch.ones(1, 2, 2, dtype=dtype), torch.ones(1, 1, 2, dtype=dtype)
    terms = advance_terms(advance_terms([], one, 0, 1), one, 2, 1)
    assert {part.dtype for part in extrapolate(terms, [1.0, 0.5], base=one)} == {dtype}


FORECASTS = [
    pytest.param(dict(forecast="reuse"), lambda x: [1.0], id="reuse"),
    pytest.param(dict(forecast="taylor", order=1), lambda x: [1.0, x], id="taylor-1"),
    pytest.param(dict(forecast="taylor", order=2), lambda x: [1.0, x, x**2 / 2], id="taylor-2"),
    pytest.param(dict(forecast="hermite", order=1, sigma=0.6), lambda x: [1.0, 2 * 0.36 * x], id="hermite-1"),
    pytest.param(
        dict(forecast="hermite", order=2, sigma=0.6),
        lambda x: [1.0, 2 * 0.36 * x, 0.36 * (4 * (0.6 * x) ** 2 - 2) / 2],
        id="hermite-2",
    ),
]


@pytest.mark.parametrize(("fields", "coefficients"), FORECASTS)
def test_in_the_engine_steps_that_hit_follow_the_closed_form(transformer, fields, coefficients):
    """Three computed steps, then hits for ever: what the skipped double blocks would add is the polynomial through the
    residuals of steps 0, 1 and 2. The input of each step's residual is the output of the first block."""
    first, last = transformer.transformer_blocks[0], transformer.transformer_blocks[-1]
    ends: dict[str, list] = {"first": [], "single": []}
    watch = [
        first.register_forward_hook(lambda module, args, output: ends["first"].append((output[1], output[0]))),
        transformer.single_transformer_blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: ends["single"].append(
                (kwargs["hidden_states"], kwargs["encoder_hidden_states"])
            ),
            with_kwargs=True,
        ),
    ]
    config = H2CacheConfig(tau1=math.inf, tau2=-1, warmup_steps=3, stages="structure", **fields)
    with h2cache.apply(transformer, config) as handle:
        denoise(transformer, steps=8)
    for hook in watch:
        hook.remove()
    assert last is not first
    assert [str(row.decision) for row in handle.trace] == ["warmup"] * 3 + ["hit"] * 5

    for stream in range(2):
        residual = [ends["single"][i][stream] - ends["first"][i][stream] for i in range(3)]
        line = residual[2] - residual[1]
        terms = [residual[2], line, line - (residual[1] - residual[0])]
        for step in range(3, 8):
            expected = ends["first"][step][stream].clone()
            for weight, term in zip(coefficients(step - 2), terms, strict=False):
                expected += weight * term
            torch.testing.assert_close(ends["single"][step][stream], expected, rtol=1e-4, atol=1e-4)


def test_in_the_engine_differences_divide_by_the_steps_between_computed_ones(transformer):
    """Computed at steps 0, 3 and 6 (two hits in a row at most): at step 7 the line has the slope (F6 - F3) / 3."""
    starts, ends = [], []
    watch = [
        transformer.transformer_blocks[0].register_forward_hook(lambda m, a, output: starts.append(output[1])),
        transformer.single_transformer_blocks[0].register_forward_pre_hook(
            lambda m, args, kwargs: ends.append(kwargs["hidden_states"]), with_kwargs=True
        ),
    ]
    config = H2CacheConfig(tau1=math.inf, stages="structure", forecast="taylor", max_consecutive_hits=2)
    with h2cache.apply(transformer, config) as handle:
        denoise(transformer, steps=9)
    for hook in watch:
        hook.remove()
    computed = [row.step for row in handle.trace if not row.decision.skips]
    assert computed == [0, 3, 6]
    residual = {step: ends[step] - starts[step] for step in computed}
    for step in (7, 8):
        expected = residual[6] + (step - 6) * (residual[6] - residual[3]) / 3
        torch.testing.assert_close(ends[step] - starts[step], expected, rtol=1e-4, atol=1e-4)
