"""Teaching aid for shapes: linear heads, trained beside the transformer and left out of the export.

The flow loss alone says little about shapes: a circle in place of a star of the same colour costs almost nothing. The
renderer knows which latent cells the shape covers, so the heads ask image tokens inside the transformer which shape,
or none, covers each of their cells. With much noise in the video that can only be answered from the caption.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from h2cache.eval.metrics.motions import FRAMES, SHAPES, SIZE, coverage, poses

from .clips import Clip

CELL = 8  # pixels of a latent cell, in each direction
PATCH = 2  # latent cells of an image token, in each direction
SPAN = 4  # frames of a latent frame; the first stands for one alone
GRID = SIZE // CELL
CLASSES = 1 + len(SHAPES)
COVERED, TOUCHED = 0.3, 0.02  # how much of a cell, averaged over its frames, makes it the shape's, or near its outline
BACKGROUND_WEIGHT = 0.25
SHAPE_WEIGHT = 4.0
CELL_LOSS = 0.15


class ShapeAid(torch.nn.Module):
    """Heads on the transformer's last double-stream block and its middle single-stream block."""

    def __init__(self, transformer: torch.nn.Module, width: int):
        super().__init__()
        singles = transformer.single_transformer_blocks
        watched = [transformer.transformer_blocks[-1], singles[len(singles) // 2]]
        self.cells = torch.nn.ModuleList(torch.nn.Linear(width, PATCH**2 * CLASSES) for _ in watched)
        self._seen: list[Tensor] = []
        for block in watched:
            block.register_forward_hook(lambda module, args, output: self._seen.append(output[0]))
        weights = torch.ones(CLASSES)
        weights[0] = BACKGROUND_WEIGHT
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, told: Tensor, shares: Tensor, shapes: Tensor) -> Tensor:
        """Cell loss (nats) of the call that the transformer has just made.

        Args:
            told: (B,) whether the caption was kept.
            shares: (B, 5, 8, 8), from `covered_shares`.
            shapes: (B,) index of each clip's shape.
        """
        seen, self._seen = self._seen, []
        tokens = _by_token((shares > COVERED) * (1 + shapes[:, None, None, None]))[told]
        return sum(
            F.cross_entropy(head(states)[told].float().reshape(-1, CLASSES), tokens.reshape(-1), self.weights)
            for head, states in zip(self.cells, seen, strict=True)
        )


def _by_token(cells: Tensor) -> Tensor:
    """(B, T, 8, 8) to (B, T * 16 tokens, 4 cells)."""
    b, t = cells.shape[:2]
    side = GRID // PATCH
    return cells.view(b, t, side, PATCH, side, PATCH).transpose(3, 4).reshape(b, t * side**2, PATCH**2)


def covered_shares(clip: Clip) -> np.ndarray:
    """(5, 8, 8) float32: how much of each latent cell the shape covers, over the frames that the cell stands for."""
    drawn = np.stack([coverage(clip.shape, pose) for pose in poses(clip.motion, clip.speed, clip.x, clip.y)])
    cells = drawn.reshape(FRAMES, GRID, CELL, GRID, CELL).mean(axis=(2, 4))
    return np.concatenate([cells[:1], cells[1:].reshape(-1, SPAN, GRID, GRID).mean(axis=1)])


def cell_weights(shares: Tensor) -> Tensor:
    """(B, 1, 5, 8, 8) weights of the flow loss, mean 1: cells that the shape touches count more than others."""
    weights = 1 + (SHAPE_WEIGHT - 1) * (shares > TOUCHED).float()
    return (weights / weights.mean())[:, None]
