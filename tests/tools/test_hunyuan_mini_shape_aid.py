"""The teaching aid of shapes asks about the cells that the shape covers, of the tokens that see them."""

import random

import numpy as np
import pytest
import torch

from h2cache.eval.metrics.motions import MOTIONS, SHAPES
from tools.hunyuan_mini import shape_aid, text
from tools.hunyuan_mini.clips import draw, random_clip
from tools.hunyuan_mini.transformer import Denoiser

LATENTS = (16, 5, 8, 8)


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    torch.manual_seed(0)
    return Denoiser().transformer


@pytest.mark.parametrize("motion", MOTIONS)
def test_shares_are_those_of_the_drawn_frames(motion):
    rng = random.Random(motion)
    clip = next(clip for clip in (random_clip(rng) for _ in range(1000)) if clip.motion == motion)
    frames = draw(clip).astype(np.float32)
    ground = frames[0, 0, 0]  # no shape reaches the corner
    far = np.abs(frames - ground).sum(-1) / np.abs(frames - ground).sum(-1).max()
    cells = far.reshape(17, 8, 8, 8, 8).mean((2, 4))
    expected = np.stack([cells[0], *(cells[start : start + 4].mean(0) for start in range(1, 17, 4))])
    np.testing.assert_allclose(shape_aid.covered_shares(clip), expected, atol=0.01)


def test_a_cell_belongs_to_the_token_that_sees_it(transformer):
    for t, row, column in ((0, 0, 0), (1, 5, 2), (4, 7, 7)):
        one = torch.zeros(1, *LATENTS)
        one[:, :, t, row, column] = 1
        with torch.no_grad():
            moved = (transformer.x_embedder(one) - transformer.x_embedder(one * 0)).abs().sum(-1)[0]
        (seen,) = moved.nonzero().flatten().tolist()
        cells = shape_aid._by_token(one[:, 0])
        assert cells.sum() == cells[0, seen].sum() == 1


def test_the_loss_asks_only_where_a_caption_was_told(transformer):
    aid = shape_aid.ShapeAid(transformer, text.WIDTH)
    shares = torch.rand(2, 5, 8, 8)
    shapes = torch.tensor([SHAPES.index("star"), SHAPES.index("ring")])
    states = torch.randn(2, 80, text.WIDTH)

    def loss(told: list[bool]) -> torch.Tensor:
        for block in (transformer.transformer_blocks[-1], transformer.single_transformer_blocks[3]):
            for hook in block._forward_hooks.values():
                hook(block, (), (states, None))
        return aid(torch.tensor(told), shares, shapes)

    first, both = loss([True, False]), loss([True, True])
    states[1] += 1
    torch.testing.assert_close(loss([True, False]), first)
    assert loss([True, True]) != both


def test_weights_have_mean_one_and_favour_the_shape():
    shares = torch.zeros(1, 5, 8, 8)
    shares[:, :, 2:4, 2:4] = 0.5
    weights = shape_aid.cell_weights(shares)
    assert weights.mean() == pytest.approx(1) and weights.shape == (1, 1, 5, 8, 8)
    assert weights[0, 0, 0, 2, 2].item() == pytest.approx(4 * weights[0, 0, 0, 0, 0].item())
