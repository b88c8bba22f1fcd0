"""Spatial clusters: k-means, one fresh token a cluster, and what reaches the others, beside the same in plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from waits import ScalarReads, Waits

from h2cache.policy.clusters import ClusterMemory, Clusters, _shuffled, kmeans, members, propagate
from h2cache.policy.forecasts import Features

IMAGE, TEXT, WIDTH = 24, 9, 7


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=draws(seed)).to(dtype)


def streams(batch: int, seed: int) -> Features:
    return normal(batch, IMAGE, WIDTH, seed=seed), normal(batch, TEXT, WIDTH, seed=seed + 500)


def mlp(tokens: torch.Tensor) -> torch.Tensor:
    """An MLP whose results do not depend on how many tokens it gets at once."""
    return tokens.sin() * 3 + 1


# The same in plain loops over one sample, in float64 and lists. Only the random numbers are drawn alike.


def plain_distance(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def plain_kmeans(tokens: list, centroids: list, iterations: int) -> tuple[list[int], list]:
    for _ in range(iterations):
        labels = []
        for token in tokens:
            distances = [plain_distance(token, centroid) for centroid in centroids]
            labels.append(distances.index(min(distances)))
        for number in range(len(centroids)):
            own = [token for token, label in zip(tokens, labels, strict=True) if label == number]
            if own:
                centroids[number] = [sum(column) / len(own) for column in zip(*own, strict=True)]
    return labels, centroids


class PlainMemory:
    """One sample of one context."""

    def __init__(self, choice: Clusters):
        self.choice, self.generator = choice, draws(choice.seed)
        self.labels, self.centroids = {}, {}

    def recluster(self, parts: Features) -> None:
        for name, tokens in zip(("image", "text"), parts, strict=True):
            tokens = tokens[0].tolist()
            if name not in self.centroids:
                places = torch.randperm(len(tokens), generator=self.generator)[: self.choice.clusters]
                self.centroids[name] = [tokens[place] for place in places.tolist()]
            found = plain_kmeans(tokens, self.centroids[name], self.choice.iterations)
            self.labels[name], self.centroids[name] = found

    def refresh(self, term: list, name: str, mlp_input: torch.Tensor) -> None:
        labels, order = self.labels[name], torch.randperm(len(term), generator=self.generator).tolist()
        fresh = {}
        for number in set(labels):
            own = [place for place, label in enumerate(labels) if label == number]
            chosen = max(own, key=lambda place: order[place])
            value = mlp_input[0, chosen]
            fresh[number] = chosen, (value if self.choice.inputs else mlp(value)).tolist()
        for place, label in enumerate(labels):
            chosen, value = fresh[label]
            ratio = 1.0 if place == chosen else self.choice.propagation if name == "image" else 0.0
            term[place] = [ratio * new + (1 - ratio) * old for new, old in zip(value, term[place], strict=True)]


@pytest.mark.parametrize("inputs", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("propagation", [0.005, 0.3, 0.0])
def test_a_run_beside_plain_loops(propagation, inputs):
    """Twelve steps of which four compute, two blocks with an image and a text MLP: every cached term after every step,
    which forecast steps change cumulatively and computed steps replace; centroids go on from the last time."""
    choice = Clusters(clusters=5, iterations=3, propagation=propagation, seed=3, inputs=inputs)
    memory, plain = ClusterMemory(choice), PlainMemory(choice)
    terms, plain_terms = {}, {}
    for step in range(12):
        if step in (0, 1, 2, 7):
            end = streams(1, seed=step)
            memory.recluster(end)
            plain.recluster(end)
            for block in range(2):
                for name, tokens in (("image", IMAGE), ("text", TEXT)):
                    terms[block, name] = normal(1, tokens, WIDTH, seed=100 * step + block)
                    plain_terms[block, name] = terms[block, name][0].tolist()
        else:
            for block, name in terms:
                mlp_input = normal(1, IMAGE if name == "image" else TEXT, WIDTH, seed=1000 + 10 * step + block)
                memory.refresh(terms[block, name], name == "text", mlp, mlp_input)
                plain.refresh(plain_terms[block, name], name, mlp_input)
        for place, term in terms.items():
            torch.testing.assert_close(term[0], torch.tensor(plain_terms[place]), rtol=1e-5, atol=1e-6)
    assert memory.image.labels[0].tolist() == plain.labels["image"]
    assert memory.text.labels[0].tolist() == plain.labels["text"]
    torch.testing.assert_close(memory.image.centroids[0], torch.tensor(plain.centroids["image"]))


@given(seed=st.integers(0, 10_000), clusters=st.integers(1, 12), iterations=st.integers(1, 6))
def test_kmeans_beside_plain_loops(seed, clusters, iterations):
    tokens = normal(1, 12, 3, seed=seed)
    found = kmeans(tokens, None, clusters, iterations, draws(seed))
    places = torch.randperm(12, generator=draws(seed))[:clusters]
    labels, centroids = plain_kmeans(tokens[0].tolist(), tokens[0, places].tolist(), iterations)
    assert found.labels[0].tolist() == labels
    torch.testing.assert_close(found.centroids[0], torch.tensor(centroids))


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_separate_blobs(seed):
    """Two from wherever it starts; five from one token of each."""
    truth = torch.arange(30) % 2
    tokens = (normal(30, 4, seed=seed) + 40 * truth.unsqueeze(1)).unsqueeze(0)
    labels = kmeans(tokens, None, 2, 10, draws(seed)).labels[0]
    assert torch.equal(labels, truth) or torch.equal(labels, 1 - truth)
    truth = torch.arange(30) % 5
    tokens = (normal(30, 4, seed=seed) + 40 * truth.unsqueeze(1)).unsqueeze(0)
    found = kmeans(tokens, tokens[:, :5], 5, 10, draws(seed))
    assert torch.equal(found.labels[0], truth)
    for number in range(5):
        torch.testing.assert_close(found.centroids[0, number], tokens[0, truth == number].mean(dim=0))


def test_distances_are_l1():
    """(3, 3) is nearer to (8.5, 3) than to (0, 0): 5.5 against 6; by L2 it would be the other way, 5.5 against 4.2."""
    tokens, start = torch.tensor([[[3.0, 3.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [8.5, 3.0]]])
    assert kmeans(tokens, start, 2, 1, draws()).labels.tolist() == [[1, 0]]


def test_an_empty_cluster_keeps_its_centroid_and_reaches_nobody():
    tokens = normal(2, 10, 3, seed=0)
    start = torch.stack([tokens[:, 0], torch.full((2, 3), 1000.0), tokens[:, 1]], dim=1)
    found = kmeans(tokens, start, 3, 4, draws())
    assert 1 not in found.labels
    assert found.centroids[:, 1].unique().tolist() == [1000.0]
    picked = members(found.labels, 3, draws())
    assert ((picked >= 0) & (picked < 10)).all()
    fresh = normal(2, 3, 3, seed=1)
    term, poisoned = normal(2, 10, 3, seed=2), normal(2, 10, 3, seed=2)
    propagate(term, found.labels, picked, fresh, 0.1)
    fresh[:, 1] = float("nan")
    propagate(poisoned, found.labels, picked, fresh, 0.1)
    assert torch.equal(term, poisoned)


def test_as_many_clusters_as_tokens_refreshes_all():
    memory = ClusterMemory(Clusters(clusters=TEXT))
    parts = normal(2, TEXT, WIDTH, seed=0), normal(2, TEXT, WIDTH, seed=1)
    memory.recluster(parts)
    for is_text in (False, True):
        term, mlp_input = normal(2, TEXT, WIDTH, seed=2), normal(2, TEXT, WIDTH, seed=3)
        memory.refresh(term, is_text, mlp, mlp_input)
        assert torch.equal(term, mlp(mlp_input))


def test_more_clusters_than_tokens_are_refused_before_anything_is_computed():
    memory = ClusterMemory(Clusters(clusters=TEXT + 1))
    before = memory.generator.get_state()
    with pytest.raises(ValueError, match=rf"clusters = {TEXT + 1}: must be from 1 to {TEXT}"):
        memory.recluster(streams(1, seed=0))
    assert list(memory.tensors()) == []
    assert torch.equal(memory.generator.get_state(), before)
    with pytest.raises(ValueError, match="clusters = 0"):
        Clusters(clusters=0).check(5)


def test_members_are_uniform_members():
    labels = torch.tensor([[0, 1, 1, 0, 1, 2, 1], [2, 2, 0, 0, 0, 0, 1]])
    generator = draws()
    picks = torch.stack([members(labels, 3, generator) for _ in range(2000)])
    assert torch.equal(labels.expand(2000, -1, -1).gather(2, picks), torch.arange(3).expand(2000, 2, 3))
    for sample in range(2):
        for number in range(3):
            own = (labels[sample] == number).nonzero().flatten()
            counts = [(picks[:, sample, number] == place).sum().item() for place in own]
            assert counts == pytest.approx([2000 / len(own)] * len(own), rel=0.15)


def test_what_propagates_by_hand():
    """Tokens 0 and 2 are in cluster 0, tokens 1 and 3 in cluster 1; tokens 2 and 1 are fresh."""
    labels, picked = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[2, 1]])
    fresh = torch.tensor([[[10.0], [20.0]]])
    term = torch.tensor([[[2.0], [4.0], [6.0], [8.0]]])
    propagate(term, labels, picked, fresh, 0.25)
    assert term.flatten().tolist() == [0.75 * 2 + 0.25 * 10, 20.0, 10.0, 0.75 * 8 + 0.25 * 20]
    propagate(term, labels, picked, fresh, 0.0)
    assert term.flatten().tolist() == [4.0, 20.0, 10.0, 11.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_terms_are_rounded_once(dtype):
    labels = torch.arange(IMAGE).remainder(4).unsqueeze(0)
    picked = members(labels, 4, draws())
    term, fresh = normal(1, IMAGE, 64, seed=0, dtype=dtype), normal(1, 4, 64, seed=1, dtype=dtype)
    exact = term.double()
    propagate(exact, labels, picked, fresh.double(), 0.005)
    propagate(term, labels, picked, fresh, 0.005)
    assert term.dtype == dtype
    assert torch.equal(term, exact.float().to(dtype))


def test_bfloat16_runs():
    """Clusters of low-precision tokens are those of the same tokens in float32."""
    parts = tuple(part.bfloat16() for part in streams(2, seed=0))
    memory, wide = ClusterMemory(Clusters(clusters=4)), ClusterMemory(Clusters(clusters=4))
    memory.recluster(parts)
    wide.recluster(tuple(part.float() for part in parts))
    assert all(torch.equal(a, b) for a, b in zip(memory.tensors(), wide.tensors(), strict=True))
    assert memory.image.centroids.dtype == torch.float32
    term = normal(2, IMAGE, WIDTH, seed=1, dtype=torch.bfloat16)
    memory.refresh(term, False, mlp, parts[0])
    assert term.dtype == torch.bfloat16 and term.isfinite().all()


def walk(batch_of: list[int], choice: Clusters) -> tuple[list[torch.Tensor], ClusterMemory]:
    """The image and text terms of a short run of the samples `batch_of`, and its memory."""
    memory = ClusterMemory(choice)
    rows = torch.tensor(batch_of)
    terms = []
    for step in range(6):
        end = tuple(part[rows] for part in streams(3, seed=step))
        if step in (0, 3):
            memory.recluster(end)
            terms += [part * 2 for part in end]
        else:
            memory.refresh(terms[-2], False, mlp, end[0])
            memory.refresh(terms[-1], True, mlp, end[1])
    return terms, memory


def test_a_sample_gets_in_a_batch_what_it_gets_alone():
    choice = Clusters(clusters=4, propagation=0.1, seed=1)
    together, memory = walk([0, 1, 2], choice)
    for sample in range(3):
        alone, own = walk([sample], choice)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[sample : sample + 1], b)
        for a, b in zip(memory.tensors(), own.tensors(), strict=True):
            assert torch.equal(a[sample : sample + 1], b)


def test_a_seed_makes_a_run():
    first, again = (walk([0], Clusters(clusters=4, seed=5))[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other, _ = walk([0], Clusters(clusters=4, seed=6))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_one_bad_sample_leaves_the_others_alone():
    clean, dirty = normal(3, IMAGE, WIDTH, seed=0), normal(3, IMAGE, WIDTH, seed=0)
    dirty[1, 5] = float("nan")
    expected, found = (kmeans(tokens, None, 4, 5, draws()) for tokens in (clean, dirty))
    for sample in (0, 2):
        assert torch.equal(found.labels[sample], expected.labels[sample])
        assert torch.equal(found.centroids[sample], expected.centroids[sample])
    assert ((found.labels >= 0) & (found.labels < 4)).all()


def test_refresh_is_in_place_calls_the_mlp_once_on_few_tokens_and_leaves_no_graph():
    memory, seen = ClusterMemory(Clusters(clusters=4)), []
    parts = tuple(part.requires_grad_() for part in streams(2, seed=0))
    memory.recluster(parts)
    weight = torch.ones(WIDTH, requires_grad=True)

    def watched(tokens):
        seen.append(tuple(tokens.shape))
        return tokens * weight

    term = normal(2, IMAGE, WIDTH, seed=1)
    where, before = term.data_ptr(), term.clone()
    assert memory.refresh(term, False, watched, parts[0]) is None
    assert term.data_ptr() == where and not torch.equal(term, before)
    assert seen == [(2, 4, WIDTH)]
    assert not term.requires_grad and not any(tensor.requires_grad for tensor in memory.tensors())
    ClusterMemory(Clusters(clusters=4, inputs=True), memory.image).refresh(term, False, watched, parts[0])
    assert len(seen) == 1, "an input is stored as it is"


def test_the_host_never_waits():
    functions, scalars = Waits(), ScalarReads()
    with functions, scalars:
        walk([0, 1, 2], Clusters(clusters=4))
    assert (functions.count, scalars.count) == (0, 0)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.numel = max(self.numel, output.numel())
        return output


def test_a_random_order_is_four_bytes_a_token():
    """It is copied to the device, and only small copies do not wait."""
    order = _shuffled(4608, torch.Generator().manual_seed(0))
    assert order.nbytes == 4 * 4608 and order.device.type == "cpu"
    assert order.sort().values.tolist() == list(range(4608))


def test_at_the_size_of_flux_nothing_is_larger_than_the_tokens():
    """On the meta device, where reading any value would raise."""
    batch, image, text, width = 2, 4096, 512, 3072
    parts = tuple(torch.empty(batch, n, width, device="meta", dtype=torch.bfloat16) for n in (image, text))
    memory, term = ClusterMemory(Clusters()), torch.empty_like(parts[0])
    with Largest() as largest:
        memory.recluster(parts)
        memory.recluster(parts)
    assert largest.numel == image * width, "one sample at a time"
    with Largest() as largest:
        memory.refresh(term, False, mlp, parts[0])
    assert largest.numel == batch * image * width
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in memory.tensors()] == [
        ((batch, image), torch.int64),
        ((batch, 16, width), torch.float32),
        ((batch, text), torch.int64),
        ((batch, 16, width), torch.float32),
    ]
    assert {tensor.device.type for tensor in memory.tensors()} == {"meta"}
