"""Pooled feature summarization, and the metric: what is averaged over what, in which precision, and the odd cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from h2cache.policy.pfs import deviation, observe, relative_l1, strides, summarize, worst_piece
from h2cache.policy.probes import FirstBlockResidual, ProbeInput


def relative(cached: torch.Tensor, current: torch.Tensor) -> float:
    return relative_l1([deviation(cached, current).tolist()])


def test_known_values():
    """4 tokens of 4 channels, target 2: squares of 2 x 2, averaged over tokens and channels alike."""
    features = torch.arange(16.0).reshape(1, 4, 4)
    # Rows 0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15: the first square is 0, 1, 4, 5.
    assert summarize(features, 2).tolist() == [[[2.5, 4.5], [10.5, 12.5]]]


@pytest.mark.parametrize(
    ("tokens", "channels", "target", "shape"),
    [
        (4096, 3072, 2048, (1, 2048, 1536)),  # FLUX.1-dev at 1024x1024, structure: stride 2
        (4608, 3072, 384, (1, 384, 256)),  # and detail: stride 12
        (4096, 96, 384, (1, 409, 9)),  # stride 10; 6 tokens and 6 channels left over are not seen
        (64, 128, 2048, (1, 64, 128)),  # below the target: not pooled (the public code divides by zero)
        (2048, 8, 2048, (1, 2048, 8)),
        (4095, 8, 2048, (1, 4095, 8)),  # 4095 // 2048 = 1
        (1, 8, 1, (1, 1, 8)),
        (4096, 3, 16, (1, 16, 1)),  # stride 256 over 3 channels: the kernel is cut to the channels
    ],
)
def test_shapes(tokens, channels, target, shape):
    assert summarize(torch.zeros(1, tokens, channels), target).shape == shape


@pytest.mark.parametrize(
    ("tokens", "target", "stride"), [(7, 2, 3), (11, 4, 2), (4608, 2048, 2), (4608, 640, 7), (4095, 2048, 1), (3, 4, 1)]
)
def test_where_tokens_are_no_multiple_of_the_target_the_stride_is_rounded_down(tokens, target, stride):
    """So that the thumbnail never has fewer values than the target asks for. What fills no window is left out."""
    assert strides(tokens, 8, target) == (stride, stride)
    features = torch.arange(float(tokens)).reshape(1, tokens, 1).expand(1, tokens, 8)
    thumbnail, _ = observe([features], None, target, None)
    first = (stride - 1) / 2  # the mean of 0 .. stride - 1
    assert thumbnail[0, :, 0].tolist() == [first + stride * row for row in range(tokens // stride)]


def test_none_does_not_pool():
    features = torch.randn(2, 10, 6)
    assert torch.equal(summarize(features, None), features)


def test_samples_are_pooled_apart():
    features = torch.randn(3, 12, 8)
    together = summarize(features, 4)
    for sample in range(3):
        torch.testing.assert_close(together[sample : sample + 1], summarize(features[sample : sample + 1], 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", [None, 4, 64])
def test_the_thumbnail_is_float32_whatever_comes(dtype, target):
    assert summarize(torch.randn(1, 16, 8).to(dtype), target).dtype == torch.float32


def test_bfloat16_features_are_averaged_in_float32():
    """bfloat16 has nothing between 256 and 258; the mean of three times 256 and 258 is 256.5 all the same."""
    features = torch.tensor([256.0, 256.0, 256.0, 258.0], dtype=torch.bfloat16).reshape(1, 2, 2)
    assert summarize(features, 1).item() == 256.5


def test_a_comparison_in_float32_sees_what_bfloat16_would_round_away():
    cached = torch.full((1, 4, 4), 1.0)
    current = torch.full((1, 4, 4), 1.001)
    assert relative(cached, current) == pytest.approx(0.001, rel=1e-3)
    assert relative(cached.bfloat16().float(), current.bfloat16().float()) == 0.0


@given(tokens=st.integers(1, 40), channels=st.integers(1, 12), target=st.integers(1, 50), seed=st.integers(0, 99))
def test_pooling_then_comparing_equals_comparing_what_was_pooled(tokens, channels, target, seed):
    """Averages are linear: the thumbnail of a difference is the difference of thumbnails, so that it is enough to keep
    the thumbnail of the reference and never the reference."""
    generator = torch.Generator().manual_seed(seed)
    cached, current = torch.randn(2, 1, tokens, channels, generator=generator).unbind()
    of_thumbnails = summarize(cached, target) - summarize(current, target)
    torch.testing.assert_close(of_thumbnails, summarize(cached - current, target), rtol=1e-5, atol=1e-6)


@given(tokens=st.integers(1, 60), channels=st.integers(1, 20), target=st.integers(1, 80))
def test_every_size_has_a_thumbnail(tokens, channels, target):
    """No input pools to nothing, whose mean would be NaN and would never hit."""
    stride = max(1, tokens // target)
    pooled = summarize(torch.ones(1, tokens, channels), target)
    assert pooled.shape == (1, tokens // stride, max(1, channels // stride))
    assert torch.equal(pooled, torch.ones_like(pooled))


def test_relative_l1_known_values():
    cached = torch.tensor([[[1.0, -1.0], [2.0, 4.0]]])
    current = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])
    assert relative(cached, current) == pytest.approx((2 + 2) / (1 + 1 + 2 + 4))
    assert relative(current, cached) == pytest.approx((2 + 2) / (1 + 1 + 2 + 2))
    assert relative(cached, cached) == 0.0


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1.0, 1e20])
def test_relative_l1_has_no_scale(scale):
    """Tiny and huge features are compared like any others: there is no epsilon to drown in."""
    cached, current = torch.tensor([[[1.0, 2.0]]]) * scale, torch.tensor([[[1.5, 2.0]]]) * scale
    assert relative(cached, current) == pytest.approx(0.5 / 3, rel=1e-5)


def test_several_samples_taken_as_one_tensor():
    """For batch_decision="mean": the metric of the whole batch, not the mean of the metrics."""
    cached = torch.tensor([[[1.0]], [[9.0]]])
    current = torch.tensor([[[2.0]], [[9.0]]])
    parts = [deviation(cached[k], current[k]).tolist() for k in range(2)]
    assert relative_l1(parts) == pytest.approx(relative(cached, current)) == pytest.approx(0.1)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("cached", "current", "expected"),
    [
        (0.0, 0.0, "undefined"),  # nothing to be relative to
        (0.0, 1.0, "undefined"),
        (1.0, NAN, "undefined"),
        (NAN, 1.0, "undefined"),
        (INF, 1.0, "undefined"),
        (INF, INF, "undefined"),
        (1.0, INF, "infinite"),
    ],
)
def test_what_cannot_be_compared_is_below_no_threshold(cached, current, expected):
    difference = relative(torch.full((1, 2, 2), cached), torch.full((1, 2, 2), current))
    assert math.isnan(difference) if expected == "undefined" else difference == INF
    assert not difference < INF


def changed_in_one_frame(tokens_a_frame: int = 4, frames: int = 5) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Streams before and after a block, at one step and at the next, where the residual of frame 3 has doubled."""
    torch.manual_seed(0)
    before, residual = torch.randn(2, 1, tokens_a_frame * frames, 8)
    later = residual.clone()
    later[:, 3 * tokens_a_frame : 4 * tokens_a_frame] *= 2
    return (before,), (before + residual,), (before + later,)


@pytest.mark.parametrize(("pieces", "expected"), [(1, None), (5, 1.0), (20, 1.0)])
def test_of_several_pieces_the_one_that_changed_most_decides(pieces, expected):
    before, first, second = changed_in_one_frame()
    probe = FirstBlockResidual(pieces=pieces)
    reference, _ = probe(ProbeInput(before, first, lambda: None), None)
    _, found = probe(ProbeInput(before, second, lambda: None), reference)
    whole = relative(*(after[0] - before[0] for after in (first, second)))
    assert whole < 0.4
    assert relative_l1([found.tolist()]) == pytest.approx(expected or whole, rel=1e-5)


def test_pieces_are_of_the_pooled_tokens_and_may_differ_in_length():
    torch.manual_seed(1)
    reference, current = torch.randn(2, 1, 7, 3)
    ratios = [relative(reference[:, rows], current[:, rows]) for rows in (slice(0, 3), slice(3, 5), slice(5, 7))]
    assert relative_l1([worst_piece(reference, current, 3).tolist()]) == pytest.approx(max(ratios), rel=1e-6)


def test_more_pieces_than_tokens_are_as_many_as_tokens():
    reference, current = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[1.5], [3.0]]])
    assert worst_piece(reference, current, 9).tolist() == [2.0, 1.0]


def test_a_piece_without_magnitude_never_hits():
    reference, current = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[1.0], [0.0]]])
    assert math.isnan(relative_l1([worst_piece(reference, current, 2).tolist()]))


def test_pieces_need_all_tokens_in_one_process():
    before, first, _ = changed_in_one_frame()
    with pytest.raises(ValueError, match=r"set H2CacheConfig\.pieces = 1"):
        FirstBlockResidual(pieces=2)(ProbeInput(before, first, lambda: None, shards=object()), None)
