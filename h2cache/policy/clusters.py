"""Spatial clusters on top of a forecast: a few fresh tokens correct what stands in for an MLP (arXiv 2509.10312).

At a computed step the tokens that leave the last double block are grouped by k-means, image and text apart. At a
forecast step one random token of each cluster goes through each double block's MLP. Its value replaces the token's
cached one, and image tokens move a little towards the fresh value of their cluster; then the forecast goes on as
usual. The cached value is the forecast's zeroth term, so what is written there stays until the next computed step, and
that step's differences are taken from it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clusters:
    """How tokens are grouped, and how far a fresh value reaches.

    `clusters`: K, for each of the two streams. `iterations` of k-means at each computed step. `propagation`: the part
    of the way that an image token moves towards its cluster's fresh value; 0: only the fresh tokens themselves change.
    `seed` of each context's random numbers. `inputs`: store the MLP's modulated input for the fresh tokens in place of
    its output, as the public diffusers port does.
    """

    clusters: int = 16
    iterations: int = 10
    propagation: float = 0.005
    seed: int = 0
    inputs: bool = False

    def check(self, tokens: int) -> None:
        """ValueError where a stream of so many tokens cannot be split into the clusters."""
        if not 1 <= self.clusters <= tokens:
            raise ValueError(f"clusters = {self.clusters!r}: must be from 1 to {tokens}, the tokens of a stream")


class Grouping(NamedTuple):
    """The tokens of one stream in K clusters: `labels` (B, N) int64 below K, `centroids` (B, K, D) float32."""

    labels: Tensor
    centroids: Tensor


def kmeans(
    tokens: Tensor, start: Tensor | None, clusters: int, iterations: int, generator: torch.Generator
) -> Grouping:
    """Group tokens (B, N, D) of any floating dtype by k-means with L1 distances and means, computed in float32.

    `start` are the centroids (B, K, D) to go on from; None: tokens at K <= N different random places, the same ones in
    each sample. The labels are those of the last assignment; the centroids are the means of that assignment. A cluster
    that loses its last token keeps its centroid. All iterations are made, since a look whether they still change
    anything would wait for the device.
    """
    if start is None:
        places = _shuffled(tokens.shape[1], generator)[:clusters].to(tokens.device, non_blocking=True)
        start = tokens.index_select(1, places)
    # One sample at a time: kernels for a batch may sum in another order, and they need the batch's memory at once.
    samples = [_lloyd(row, centroids, iterations) for row, centroids in zip(tokens, start.float(), strict=True)]
    return Grouping(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


def _lloyd(tokens: Tensor, centroids: Tensor, iterations: int) -> Grouping:
    """k-means of one sample: tokens (N, D), centroids (K, D) float32."""
    # Always a copy: the alignment of a view into the batch could choose another kernel, which rounds differently.
    tokens = tokens.to(torch.float32, copy=True)
    numbers = torch.arange(len(centroids), device=tokens.device).unsqueeze(1)
    for _ in range(iterations):
        labels = torch.cdist(tokens, centroids, p=1).argmin(dim=1)
        membership = (labels == numbers).float()  # (K, N)
        sizes = membership.sum(dim=1, keepdim=True)
        # A product and not a scattered sum, whose order of additions differs from run to run on a GPU.
        centroids = torch.where(sizes > 0, membership @ tokens / sizes, centroids)
    return Grouping(labels, centroids)


def members(labels: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """One uniformly random token of each cluster, (B, K) int64; token 0 for a cluster without any.

    `labels`: (B, N) int64. All samples of a batch share one draw, so each gets what it would get alone.
    """
    ranks = _shuffled(labels.shape[1], generator).to(labels.device, non_blocking=True)
    numbers = torch.arange(clusters, device=labels.device).unsqueeze(1)
    return torch.where(labels.unsqueeze(1) == numbers, ranks, -1).argmax(dim=2)


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    """0 to `count` - 1 in random order, on the CPU; in few bytes, since small copies to a device do not wait."""
    return torch.randperm(count, generator=generator, dtype=torch.int32, device="cpu")


def propagate(term: Tensor, labels: Tensor, picked: Tensor, fresh: Tensor, ratio: float) -> None:
    """Write fresh values (B, K, D) of the tokens `picked` (B, K) into `term` (B, N, D), in place, and spread them.

    The picked tokens get their values as they are; each other token becomes `(1 - ratio) * term + ratio * fresh` with
    the fresh value of its own cluster, computed in float32 and rounded once; ratio 0 leaves it alone. What is fresh for
    a cluster without tokens reaches nobody.
    """
    own = fresh.to(term.dtype).gather(1, labels.unsqueeze(2).expand_as(term))
    # Read from the tokens' side: a scatter would write one place twice where an empty cluster picked a used token.
    is_picked = picked.gather(1, labels) == torch.arange(labels.shape[1], device=labels.device)
    if ratio:
        term.lerp_(own, ratio)
    torch.where(is_picked.unsqueeze(2), own, term, out=term)


@dataclass
class ClusterMemory:
    """The clusters of one context (one branch of a run), for all samples of the batch.

    Memory with N image and M text tokens of width D: labels (B, N) and (B, M) int64, centroids twice (B, K, D) float32.
    At FLUX.1-dev, 1024x1024, 16 clusters: 0.4 MB an image. The random numbers come from the CPU, so that neither the
    device nor the batch changes them; they follow the order of the calls.
    """

    choice: Clusters
    image: Grouping | None = None
    text: Grouping | None = None
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(device="cpu").manual_seed(self.choice.seed)

    @torch.no_grad()
    def recluster(self, streams: tuple[Tensor, ...]) -> None:
        """After the last block with an image MLP, at a computed step: group the tokens anew, from the last centroids.

        `streams` are the image tokens (B, N, D) and, where the blocks have them, the text tokens (B, M, D).

        ValueError, before anything is computed, if a stream has fewer tokens than there are clusters.
        """
        self.choice.check(min(tokens.shape[1] for tokens in streams))
        self.image = self._grouped(streams[0], self.image)
        if len(streams) > 1:
            self.text = self._grouped(streams[1], self.text)

    def _grouped(self, tokens: Tensor, last: Grouping | None) -> Grouping:
        start = last.centroids if last else None
        return kmeans(tokens, start, self.choice.clusters, self.choice.iterations, self.generator)

    @torch.no_grad()
    def refresh(self, term: Tensor, is_text: bool, mlp: Callable[[Tensor], Tensor], mlp_input: Tensor) -> None:
        """At a forecast step, for one MLP: correct its cached output `term` (B, N, D), in place, by a few fresh tokens.

        `mlp` maps modulated inputs to outputs (before the gate) and is called on (B, K, D), tokens of `mlp_input`
        (B, N, D). Text tokens that were not picked stay as they are. `term` must share no memory with what the model
        still uses.
        """
        grouping = self.text if is_text else self.image
        assert grouping is not None  # nothing is forecast before a step is computed
        picked = members(grouping.labels, self.choice.clusters, self.generator)
        fresh = mlp_input.gather(1, picked.unsqueeze(2).expand(-1, -1, mlp_input.shape[2]))
        if not self.choice.inputs:
            fresh = mlp(fresh)
        propagate(term, grouping.labels, picked, fresh, 0.0 if is_text else self.choice.propagation)

    def tensors(self) -> Iterator[Tensor]:
        """What is held: labels and centroids of both streams."""
        for grouping in (self.image, self.text):
            yield from grouping or ()
