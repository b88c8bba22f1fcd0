"""Teaching aids for spelling: two kinds of linear heads, trained beside the transformer and left out of the export.

The flow loss alone says little about which letter belongs where: a wrong letter in the right colour costs almost
nothing. The renderer knows the answer, so the heads ask for it. From the T5 state of each capital letter, where the
letter stands; from image tokens inside the transformer, which letter covers each 4x4 pixel cell. With much noise in the
image the second can only be answered by attending to the right letter of the caption.
"""

import string

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Tokenizer

from .scenes import LETTER_GRID, SIZE, Letter

CELLS = 16 // LETTER_GRID  # along a side of an image token, which shows 16x16 pixels
CLASSES = 1 + len(string.ascii_uppercase)
BACKGROUND_WEIGHT = 0.25
CELL_LOSS, PLACE_LOSS = 0.15, 3.0
WORD_WEIGHT = 3.0


class SpellingAid(torch.nn.Module):
    """Heads on the transformer's last double-stream block and its middle single-stream block, and on T5."""

    def __init__(self, transformer: torch.nn.Module, tokenizer: T5Tokenizer, width: int):
        super().__init__()
        capitals = [tokenizer.convert_tokens_to_ids(form) for c in string.ascii_uppercase for form in (c, f"▁{c}")]
        self.register_buffer("capitals", torch.tensor(capitals), persistent=False)
        singles = transformer.single_transformer_blocks
        watched = [transformer.transformer_blocks[-1], singles[len(singles) // 2]]
        self.cells = torch.nn.ModuleList(torch.nn.Linear(width, CELLS**2 * CLASSES) for _ in watched)
        self.place = torch.nn.Linear(width, 3)
        self._seen: list[Tensor] = []
        for block in watched:
            block.register_forward_hook(lambda module, args, output: self._seen.append(output[1]))
        weights = torch.ones(CLASSES)
        weights[0] = BACKGROUND_WEIGHT
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, ids: Tensor, states: Tensor, letters: list[list[Letter]], maps: Tensor) -> tuple[Tensor, Tensor]:
        """Cell loss (nats) and place loss of the call that the transformer has just made.

        `ids` (B, 40) and `states` (B, 40, D) of T5; `letters` of each scene, none where its caption was dropped; `maps`
        (B, 64, 16), the class of each cell of each image token.
        """
        told = torch.tensor([bool(word) for word in letters], device=ids.device)
        seen, self._seen = self._seen, []
        cell = sum(
            F.cross_entropy(head(tokens)[told].float().reshape(-1, CLASSES), maps[told].reshape(-1), self.weights)
            for head, tokens in zip(self.cells, seen, strict=True)
        )
        places = [(letter.x / SIZE, letter.y / SIZE, letter.width / SIZE) for word in letters for letter in word]
        is_letter = torch.isin(ids, self.capitals) & told[:, None]
        target = torch.tensor(places, device=ids.device)
        place = F.smooth_l1_loss(self.place(states[is_letter]).float(), target, beta=0.02)
        return cell, place


def token_maps(letter_maps: Tensor) -> Tensor:
    """(B, 32, 32) maps of letters to (B, 64 tokens, 16 cells)."""
    b, side, _ = letter_maps.shape
    cells = letter_maps.view(b, side // CELLS, CELLS, side // CELLS, CELLS).transpose(2, 3)
    return cells.reshape(b, (side // CELLS) ** 2, CELLS**2).long()


def token_weights(maps: Tensor) -> Tensor:
    """(B, 64, 1) weights of the flow loss, mean 1: image tokens with letters count more than others."""
    weights = 1 + (WORD_WEIGHT - 1) * (maps > 0).any(dim=-1, keepdim=True).float()
    return weights / weights.mean()
