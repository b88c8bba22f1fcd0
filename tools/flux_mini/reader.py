"""Trains the reader of words (`h2cache.eval.metrics.reader`) on rendered scenes alone.

`export_reader.py` writes what ships.

It is given letters as `attributes.look` sees them, freed from colours and whatever is not their sign. It learns random
strings only, so that it has no vocabulary into which it could correct a misspelt sign, and never sees an image that a
model made: softness, noise and wobbly letters are imitated on the renders.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from h2cache.eval.metrics.reader import BLANK, FRAMES, LETTERS, Reader, read, stack
from h2cache.eval.metrics.signs import WINDOW

from .attributes import letters_of, window_corner
from .scenes import HELD_OUT_WORDS, Scene, letter_boxes, random_scene
from .scores import word_scores
from .training import Log, advance, cosine, resume, save, set_rate, stage_options

LETTER_CORE = 0.5  # the part of a letter's width, around its middle, whose frames are taught to name it
LONGEST = 8
VALIDATION = 400  # scenes
STEPS, BATCH, LEARNING_RATE = 3000, 32, 2e-3


def random_string(rng: random.Random) -> str:
    """2 to 8 letters, never a held-out word."""
    while True:
        word = "".join(rng.choices(LETTERS, k=rng.randint(2, LONGEST)))
        if word not in HELD_OUT_WORDS:
            return word


def augment(letters: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What an autoencoder and a sampler might do to well-drawn (B, 1, 48, 120) letters: move, scale and wobble them,
    soften them, thin or thicken strokes until some break or fill, let parts fade, add noise. Also returns (B,)
    horizontal scale and shift: what stood at x (pixels) now stands at about scale * x + shift."""
    count, (height, width) = len(letters), WINDOW
    size = torch.tensor([width, height]) / 2  # pixels in a unit of the sampling grid, x first

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    def smooth(channels: int, grain: int) -> Tensor:
        """Normal noise that varies over `grain` pixels."""
        coarse = torch.randn(count, channels, height // grain, width // grain, generator=generator)
        return F.interpolate(coarse, WINDOW, mode="bicubic")

    scale = uniform(0.85, 1.05) + 0.04 * torch.randn(count, 1, 1, 2, generator=generator)
    shift = 1.5 * torch.randn(count, 1, 1, 2, generator=generator) / size
    wobble = uniform(0, 1.5) * smooth(2, grain=12) + uniform(0, 0.5) * smooth(2, grain=4)
    still = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 1, *WINDOW], align_corners=False)
    # The grid says where a pixel of the result comes from: the inverse of the move.
    grid = (still - shift) / scale + wobble.permute(0, 2, 3, 1) / size
    letters = F.grid_sample(letters, grid, align_corners=False)
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row)[None, None]
    for _ in range(3):
        amount = uniform(-0.7, 1).clamp(min=0)
        letters = torch.lerp(letters, F.conv2d(letters, kernel, padding=1), amount)
    # A soft threshold between 0 and 1 that differs from place to place.
    steepness, threshold = uniform(1, 10), (0.5 + uniform(0, 0.2) * smooth(1, grain=8)).clamp(0.2, 0.8)
    low, high = torch.sigmoid(-steepness * threshold), torch.sigmoid(steepness * (1 - threshold))
    letters = (torch.sigmoid(steepness * (letters - threshold)) - low) / (high - low)
    fading = 1 - uniform(-0.4, 0.4).clamp(min=0) * smooth(1, grain=16).abs()
    letters = uniform(0.7, 1.2) * fading * letters + uniform(0, 0.1) * torch.randn(letters.shape, generator=generator)
    scale, shift = scale[:, 0, 0, 0], shift[:, 0, 0, 0]
    return letters.clamp(0, 1), scale, (1 - scale + shift) * width / 2


@dataclass
class Batch:
    letters: Tensor  # (B, 1, 48, 120)
    words: list[str]
    frames: Tensor  # (B, 60), the class of each frame


def examples(seed: int, step: int, count: int) -> Batch:
    """Augmented scenes: a function of seed and step."""
    rng = random.Random(f"reader-{seed}-{step}")
    scenes = [random_scene(rng, word=random_string(rng)) for _ in range(count)]
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    letters, scales, shifts = augment(stack([letters_of(scene) for scene in scenes]), generator)
    frames = torch.full((count, FRAMES), BLANK)
    for i, scene in enumerate(scenes):
        left, _ = window_corner(scene)
        for letter in letter_boxes(scene):
            middle, half = scales[i] * (letter.x - left) + shifts[i], scales[i] * letter.width * LETTER_CORE / 2
            distances = (2 * torch.arange(FRAMES) + 1 - middle).abs()
            frames[i, (distances <= half) | (distances == distances.min())] = 1 + LETTERS.index(letter.character)
    return Batch(letters, [scene.word for scene in scenes], frames)


def losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """CTC (Graves et al., ICML 2006), and the cross-entropy of the frames, which tells CTC from the start where the
    letters are; alone it says "blank" for thousands of steps."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    targets = torch.tensor([1 + LETTERS.index(c) for word in batch.words for c in word])
    lengths = torch.tensor([len(word) for word in batch.words])
    frames = torch.full_like(lengths, FRAMES)
    ctc = F.ctc_loss(log_probabilities.transpose(0, 1), targets, frames, lengths, blank=BLANK)
    return ctc, F.nll_loss(log_probabilities.flatten(0, 1), batch.frames.flatten())


def held_out_scenes(seed: int, count: int) -> list[Scene]:
    """Scenes of the held-out words in turn, everything else at random."""
    rng = random.Random(f"held-out-{seed}")
    return [random_scene(rng, word=HELD_OUT_WORDS[i % len(HELD_OUT_WORDS)]) for i in range(count)]


def train(
    work: Path, steps: int = STEPS, batch: int = BATCH, learning_rate: float = LEARNING_RATE, seed: int = 0
) -> Reader:
    """Train the reader, or go on from `reader.pt` in `work`; in evaluation mode when done."""
    torch.manual_seed(seed)
    reader = Reader().to(memory_format=torch.channels_last)
    optims = [torch.optim.AdamW(reader.parameters(), lr=learning_rate, weight_decay=0.01)]
    checkpoint = work / "reader.pt"
    start = resume(checkpoint, model=reader, optimizers=optims)
    scenes = held_out_scenes(seed, VALIDATION)
    validation = [letters_of(scene) for scene in scenes]
    log = Log(work / "reader.csv", ("ctc", "frames", "word_error", "cer"), start)
    for step in range(start, steps):
        set_rate(optims, learning_rate * cosine(step, steps))
        shown = examples(seed, step, batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader(shown.letters)
        ctc, frames = losses(logits, shown)
        (ctc + frames).backward()
        advance(optims, reader.parameters())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            reader.eval()
            scores = word_scores(list(zip((s.word for s in scenes), read(reader, validation), strict=True)))
            reader.train()
            log.write(
                step + 1, ctc=ctc.item(), frames=frames.item(), word_error=1 - scores["accuracy"], cer=scores["cer"]
            )
            save(checkpoint, step + 1, model=reader, optimizers=optims)
    return reader.eval().requires_grad_(False)


def main() -> None:
    options = stage_options(__doc__, steps=STEPS, batch=BATCH, learning_rate=LEARNING_RATE)
    train(options.work, options.steps, options.batch, options.learning_rate, options.seed)


if __name__ == "__main__":
    main()
