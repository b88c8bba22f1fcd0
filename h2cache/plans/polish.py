"""The last polish: all weights of a plan together, by the gradient of the distance of its images.

Fitting takes step after step, each as near to the reference as it can; here steps may make up for each other. The
gradient goes back through the decoder and every call of the model, which is run once more for it, so that only the
activations of one call are held. Batches of prompts take turns, and the last of them decides when it was best.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .closed_form import Weights
from .promise import decibels
from .trajectories import Trajectories
from .weights import combine

PACE = 8e-4  # how far a weight moves the latents in a round, at most, relative to their size
MEMORY = (0.8, 0.95)  # of gradients and their squares, over few rounds
LOOKS = 3  # how often the last batch is asked
CALLS = 3  # of the model for an image's gradient: forward, forward again, backward


def evaluations(computed: int, sizes: Sequence[int], rounds: int) -> int:
    """What a polish costs, in calls of the model on one image, a backward pass being one."""
    if len(sizes) < 2 or not rounds:
        return 0
    turns = [sizes[turn % (len(sizes) - 1)] for turn in range(rounds)]
    return computed * (CALLS * sum(turns) + sizes[0] + sizes[-1] * (LOOKS + 1))


def polish(runs: Trajectories, computed: Sequence[int], weights: Weights, history: int, rounds: int) -> Weights:
    """Weights that bring the images of other prompts nearer; those that were given where there is but one batch."""
    batches = range(len(runs.sizes))
    if len(batches) < 2 or not rounds:
        return weights
    *own, other = batches
    knobs = Knobs(runs, computed, weights, history, own[0])
    best, found = _mean(knobs, runs, other), [each.clone() for each in knobs.turned]
    optimizer = torch.optim.Adam([knob.requires_grad_() for knob in knobs.turned], lr=PACE, betas=MEMORY)
    for turn in range(rounds):
        for group in optimizer.param_groups:
            group["lr"] = PACE * (1 - 0.9 * turn / rounds)
        with torch.enable_grad():
            distance = -_decibels(knobs, runs, own[turn % len(own)]).mean()
            slopes = torch.autograd.grad(distance, knobs.turned)  # of these alone: the model's weights keep none
        for knob, slope in zip(knobs.turned, slopes, strict=True):
            knob.grad = slope
        optimizer.step()
        if (turn + 1) * LOOKS // rounds > turn * LOOKS // rounds:
            reached = _mean(knobs, runs, other)
            if reached > best:
                best, found = reached, [each.detach().clone() for each in knobs.turned]
    return knobs.weights(found)


class Knobs:
    """The weights of a plan, in coordinates that each move the latents alike.

    Fields:
        turned: of each step of the plan, by how much its weights are moved along its knobs.
    """

    def __init__(self, runs: Trajectories, computed: Sequence[int], weights: Weights, history: int, batch: int):
        """Follow the plan on a batch, to see what its outputs are like."""
        self.computed, self.start, self.history = tuple(computed), dict(weights), history
        self.strides = [runs.sigmas[step + 1] - runs.sigmas[step] for step in range(runs.steps)]
        self.segments = [range(*ends) for ends in pairwise((*self.computed, runs.steps))]
        self._knobs: list[Tensor] = []
        self.turned: list[Tensor] = []
        with torch.no_grad():
            for latents, outputs in self._followed(runs, batch):
                newest, *older = (each.double().flatten(1) for each in outputs)
                changes = torch.stack([newest * 0, *(each - newest for each in older)], dim=1)
                size = latents.double().flatten(1).square().sum(1).mean().sqrt()
                knobs = _evenly(changes, size) if older else torch.zeros(1, 0)
                self._knobs.append(knobs.to(latents.device, torch.float32))
                self.turned.append(torch.zeros(knobs.shape[1], device=latents.device))

    def step(self, index: int, latents: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """The latents after a step of the plan and the skipped ones after it."""
        moved = latents.float()
        for step in self.segments[index]:
            moved = moved + self.strides[step] * combine(self.start.get(step, (1.0,)), outputs).float()
        for share, output in zip(self._knobs[index] @ self.turned[index], outputs, strict=True):
            moved = moved + share * output.float()
        return moved.to(latents.dtype)

    def _followed(self, runs: Trajectories, batch: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Latents before, and outputs at each step, of the plan as it was given."""
        latents, outputs = runs.latents[0].split(runs.sizes)[batch], ()
        for index, step in enumerate(self.computed):
            outputs = (runs.compute_batch(batch, step, latents), *outputs)[: self.history]
            yield latents, outputs
            for each in self.segments[index]:
                output = combine(self.start.get(each, (1.0,)), outputs)
                latents = (latents.float() + self.strides[each] * output.float()).to(latents.dtype)

    def weights(self, turned: Sequence[Tensor]) -> Mapping[int, tuple[float, ...]]:
        """By step: what was given, and what turning the knobs adds, spread over the skipped steps after each computed
        one, or at this where there are none."""
        made = dict(self.start)
        for segment, knobs, by in zip(self.segments, self._knobs, turned, strict=True):
            added = (knobs.double() @ by.double()).tolist()
            if len(added) < 2:
                continue
            moved = segment[1:] or segment
            length = sum(self.strides[step] for step in moved)
            for step in moved:
                known = (*made.get(step, (1.0,)), *(0.0,) * len(added))[: len(added)]
                made[step] = tuple(weight + more / length for weight, more in zip(known, added, strict=True))
        return made


def _evenly(changes: Tensor, size: Tensor) -> Tensor:
    """(K, K - 1): directions of K strides, which sum to zero, each of which moves the latents by `size`.

    Directions in which outputs hardly differ are left out: a weight would have to move far.
    """
    gram = (changes @ changes.mT).mean(0)[1:, 1:].cpu()
    values, vectors = torch.linalg.eigh(gram)
    reach = torch.where(values > 1e-7 * values[-1], values.clamp_min(1e-300).rsqrt(), 0.0)
    older = vectors * reach * size.cpu()
    return torch.cat([-older.sum(0, keepdim=True), older])


def _decibels(knobs: Knobs, runs: Trajectories, batch: int) -> Tensor:
    """PSNR of the images of a batch."""
    latents, outputs = runs.latents[0].split(runs.sizes)[batch], ()
    for index, step in enumerate(knobs.computed):
        output = checkpoint(runs.compute_batch, batch, step, latents, use_reentrant=False)
        outputs = (output, *outputs)[: knobs.history]
        latents = knobs.step(index, latents, outputs)
    return decibels(runs.decode(latents), runs.images.split(runs.sizes)[batch])


@torch.no_grad()
def _mean(knobs: Knobs, runs: Trajectories, batch: int) -> float:
    return _decibels(knobs, runs, batch).mean().item()
