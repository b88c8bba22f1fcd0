"""Models that write in place to what the cache keeps: their images stay right, and they still skip.

A toy model adds and scales either in memory of its own, or in place in one of several ways. The numbers are the same,
bit for bit, so that the first one says what the others are to make.
"""

import logging
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import h2cache
from h2cache import H2CacheConfig
from h2cache.adapters import Registry
from h2cache.adapters.base import Adapter, BlockList, BlockModules, Role
from h2cache.baselines import BlockCacheConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.runtime.interception import interception_of
from h2cache.runtime.rope_cache import Once

WIDTH, STEPS = 8, 10


# How a model may add `x` to the stream `h`; each returns the sum.


def elsewhere(h, x):
    return h + x


def counted(h, x):
    return h.add_(x)


def counted_and_returned_elsewhere(h, x):
    total = h + x
    h.mul_(3)
    return total


def uncounted(h, x):
    h.data.add_(x)
    return h


def uncounted_by_a_view(h, x):
    h.data.add_(x)
    return h.view(h.shape)


def by_address(h, x):
    array = h.numpy()
    array += x.numpy()
    return torch.from_numpy(array)


WRITERS = [counted, counted_and_returned_elsewhere, uncounted, uncounted_by_a_view, by_address]


class Part(nn.Linear):
    """An attention or an MLP, as far as a cache is concerned."""

    def forward(self, hidden_states):
        return super().forward(hidden_states).tanh()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Part(WIDTH, WIDTH), Part(WIDTH, WIDTH)
        self.add = elsewhere
        self.scales_in_place = False

    def forward(self, hidden_states, temb):
        mixed = self.attn(self.attn_input(hidden_states, temb))
        if self.scales_in_place:
            mixed.mul_(0.7)
        else:
            mixed = mixed * 0.7
        return self.add(hidden_states, mixed + self.mlp(mixed))

    def modulated(self, hidden_states, temb):
        return hidden_states * (1 + temb)

    def attn_input(self, hidden_states, temb):
        return self.modulated(hidden_states, temb)


class Toy(nn.Module):
    """Two lists of four blocks; `control` is added to the stream after each block of the first list."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.ModuleList(Block() for _ in range(4)) for _ in range(2))
        self.add_control = elsewhere

    def forward(self, hidden_states, timestep, encoder_hidden_states, control=None):
        temb = 0.5 * torch.sin(3 * timestep).view(-1, 1, 1) + encoder_hidden_states.mean(1, keepdim=True)
        h = hidden_states * 0.9
        for index, block in enumerate(self.first):
            h = block(hidden_states=h, temb=temb)
            if control is not None and index in control:
                h = self.add_control(h, control[index])
        for block in self.second:
            h = block(hidden_states=h, temb=temb)
        return h * 0.5


class ToyAdapter(Adapter):
    family = "toy"
    classes = ("Toy",)
    library = __name__.partition(".")[0]
    block_lists = (BlockList("first", Role.STRUCTURE), BlockList("second", Role.DETAIL))
    control_arguments = ("control",)

    def modulated(self, block, arguments):
        return block.modulated(arguments["hidden_states"], arguments["temb"])

    def modules(self, block):
        return BlockModules(forecast=(block.attn, block.mlp), image_mlp=block.mlp)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(Registry, "added", (ToyAdapter,))


def toy(add=elsewhere, blocks=range(4), scales_in_place=False):
    """The model; `blocks`, counted in each list, write by `add`. All toys have the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Toy().eval()
    for listed in (model.first, model.second):
        for index in blocks:
            listed[index].add = add
        for block in listed:
            block.scales_in_place = scales_in_place
    return model


def denoise(model, batch=2, before_step=None, **arguments):
    """The latents (B, 6, WIDTH) after a run."""
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(batch, tokens, WIDTH, generator=generator) for tokens in (6, 3))
    with torch.no_grad():
        for step in range(STEPS):
            if before_step is not None:
                before_step(step)
            timestep = torch.full((batch,), 1 - step / STEPS)
            output = model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, **arguments)
            latents = latents - output / STEPS
    return latents


def guarded(model):
    """Whether the cache of a model keeps copies."""
    return interception_of(model).owner._guard.copies


def decisions(handle, run=None):
    return [(r.step, r.sample, r.stage, str(r.decision)) for r in handle.trace if run is None or r.run == run]


def cached(model, config, runs=1, **options):
    """The images and the decisions of so many runs with one cache, and whether it ended up with copies."""
    with h2cache.apply(model, config) as handle:
        images = [denoise(model, **options) for _ in range(runs)]
        return images, [decisions(handle, run) for run in range(runs)], guarded(model)


def hits(rows):
    return sum(decision in ("hit", "forced") for *_, decision in rows)


MEASURING = [
    pytest.param(H2CacheConfig(tau1=0.15, tau2=0.15), id="h2"),
    pytest.param(H2CacheConfig(tau1=0.15, tau2=0.15, forecast="taylor", pool1=3, hierarchical=False), id="h2-taylor"),
    pytest.param(BlockCacheConfig(threshold=0.15), id="block-cache"),
    pytest.param(TeaCacheConfig(threshold=0.2, coefficients=(1.0, 0.0)), id="teacache"),
]
SCHEDULED = [
    pytest.param(TaylorSeerConfig(interval=3, granularity="stage"), id="taylorseer-stage"),
    pytest.param(HiCacheConfig(interval=3, granularity="stage", sigma="auto"), id="hicache-auto-stage"),
]
NEVER = [
    pytest.param(H2CacheConfig(tau1=-1, tau2=-1), id="h2"),
    pytest.param(BlockCacheConfig(threshold=-1), id="block-cache"),
    pytest.param(TeaCacheConfig(threshold=-1, coefficients=(1.0, 0.0)), id="teacache"),
]
PLACES = [pytest.param(range(4), id="all"), pytest.param([0], id="first"), pytest.param([1], id="second")]


@pytest.mark.parametrize("blocks", PLACES)
@pytest.mark.parametrize("add", WRITERS)
@pytest.mark.parametrize("config", NEVER)
def test_without_hits_the_images_are_those_without_a_cache(config, add, blocks):
    expected = denoise(toy())
    assert torch.equal(denoise(toy(add, blocks)), expected)
    (first, second), rows, _ = cached(toy(add, blocks), config, runs=2)
    assert hits(rows[0]) == 0
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("blocks", PLACES)
@pytest.mark.parametrize("add", WRITERS)
@pytest.mark.parametrize("config", MEASURING)
def test_with_copies_it_skips_as_a_model_that_does_not_write_in_place(config, add, blocks, caplog):
    """From the second run on. In the first one, what was spoiled before it was noticed is computed anew."""
    (expected,), (expected_rows,), copies = cached(toy(), config)
    assert 0 < hits(expected_rows) < len(expected_rows)
    assert not copies
    (_, second), (first_rows, second_rows), _ = cached(toy(add, blocks), config, runs=2)
    assert torch.equal(second, expected)
    assert second_rows == expected_rows
    assert hits(first_rows) > 0
    assert len(caplog.records) <= 1


@pytest.mark.parametrize("add", WRITERS)
@pytest.mark.parametrize("config", SCHEDULED)
def test_what_follows_a_schedule_is_right_from_the_first_run(config, add):
    """Before the first hit at step 3 the stage is computed twice after the writer was noticed: enough for order 1."""
    (expected,), (expected_rows,), _ = cached(toy(), config)
    (image,), (rows,), copies = cached(toy(add), config)
    assert torch.equal(image, expected)
    assert rows == expected_rows
    assert copies


@pytest.mark.parametrize("add", WRITERS)
@pytest.mark.parametrize("config", [*MEASURING, *SCHEDULED])
def test_it_is_said_exactly_once(config, add, caplog):
    model = toy(add)
    with caplog.at_level(logging.WARNING, "h2cache"):
        cached(model, config, runs=3)
    (record,) = caplog.records
    assert "writes in place to tensors that the cache keeps" in record.getMessage()


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("sigma", [None, "auto"])
def test_a_model_that_writes_to_what_its_modules_returned(order, sigma, caplog):
    """Also to what was forecast: of order 0 that is the remembered output itself."""
    if sigma is None:
        config = TaylorSeerConfig(interval=4, order=order)
    else:
        config = HiCacheConfig(interval=4, order=max(order, 1), sigma=sigma)
    (expected,), (expected_rows,), _ = cached(toy(), config)
    (_, second), rows, copies = cached(toy(scales_in_place=True), config, runs=2)
    assert torch.equal(second, expected)
    assert rows[1] == expected_rows
    assert copies
    assert len(caplog.records) == 1


def test_a_module_output_that_was_written_to_once_is_in_no_difference():
    """The model writes in place at step 0 only; the next difference must not be taken from what it left."""
    config = TaylorSeerConfig(interval=3, order=2, first_enhance=3)
    model = toy()

    def write(step):
        for block in (*model.first, *model.second):
            block.scales_in_place = step == 1

    (image,), (rows,), _ = cached(model, config, before_step=write)
    assert hits(rows) > 0

    expected_model = toy()

    def forget(step):
        if step == 2:
            for key in list(memory_of(expected_model).modules)[::2]:  # of the attentions, which alone are written to
                del memory_of(expected_model).modules[key]

    (expected,), _, _ = cached(expected_model, config, before_step=forget)
    assert torch.equal(image, expected)


def memory_of(model):
    """The only branch of the run in progress."""
    (run,) = {id(run): run for run in interception_of(model).owner.runs._by_name.values()}.values()
    (context,) = run.contexts
    return context


@pytest.mark.parametrize("kept", ["reference", "terms"])
def test_memory_of_a_stage_that_somebody_overwrote_is_forgotten(kept, caplog):
    """At an infinite threshold all steps but the first are skipped, and the one after the overwriting is not."""
    config, images = H2CacheConfig(tau1=math.inf, tau2=math.inf), []
    for overwrite in (True, False):
        model = toy()

        def spoil(step, model=model, overwrite=overwrite):
            if step != 4:
                return
            for memory in memory_of(model).memories():
                if not overwrite:
                    memory.forget()
                elif kept == "reference":
                    memory.reference.fill_(7)
                else:
                    memory.terms[0][0].fill_(7)

        (image,), (rows,), _ = cached(model, config, before_step=spoil)
        assert {row[0] for row in rows if row[-1] in ("warmup", "compute")} == {0, 4}
        images.append(image)
    assert torch.equal(*images)
    assert len(caplog.records) == 1


def test_memory_of_modules_that_somebody_overwrote_is_forgotten():
    config, images = TaylorSeerConfig(interval=5), []
    for overwrite in (True, False):
        model = toy()

        def spoil(step, model=model, overwrite=overwrite):
            if step != 4:
                return
            if overwrite:
                next(iter(memory_of(model).modules.values())).terms[1][0].fill_(7)
            else:
                memory_of(model).modules.clear()

        (image,), (rows,), _ = cached(model, config, before_step=spoil)
        assert [row[-1] for row in rows if row[0] == 4][:1] == ["compute"]
        images.append(image)
    assert torch.equal(*images)


@pytest.mark.parametrize("after", [[0, 1, 2], [1, 2], [2]], ids=str)
@pytest.mark.parametrize("config", [*MEASURING, *SCHEDULED])
def test_control_that_is_added_in_place_counts_once(config, after):
    """What the model adds between the blocks comes anew at a hit, so it must not be in what is remembered."""
    generator = torch.Generator().manual_seed(5)
    control = {index: 0.3 * torch.randn(2, 6, WIDTH, generator=generator) for index in after}
    (expected,), (expected_rows,), _ = cached(toy(), config, control=control)
    model = toy()
    model.add_control = counted
    (_, second), (_, rows), copies = cached(model, config, runs=2, control=control)
    assert copies
    assert rows == expected_rows
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [*MEASURING, *SCHEDULED, pytest.param(TaylorSeerConfig(interval=3), id="modules")])
@pytest.mark.parametrize(
    "model",
    [dict(add=counted), dict(add=counted_and_returned_elsewhere), dict(scales_in_place=True)],
    ids=["adds", "adds-and-returns-elsewhere", "scales"],
)
def test_in_inference_mode_where_no_write_is_counted(config, model):
    with torch.inference_mode():
        (expected,), (expected_rows,), _ = cached(toy(), config)
        assert hits(expected_rows) > 0
        (image,), (rows,), _ = cached(toy(**model), config)
        assert torch.equal(image, expected)
        assert rows == expected_rows


def test_a_probe_whose_input_was_written_to_decides_nothing():
    """At an infinite threshold whatever has a reference is skipped: step 3 must not use its own probe, nor step 4."""
    model = toy()

    def write(step):
        model.first[0].add = counted_and_returned_elsewhere if step == 3 else elsewhere

    _, (rows,), copies = cached(model, H2CacheConfig(tau1=math.inf, tau2=math.inf), batch=1, before_step=write)
    assert copies
    assert [row[0] for row in rows if row[2] == "structure" and row[3] in ("warmup", "compute")] == [0, 3, 4]


class BufferedBlock(Block):
    """Modulates into the same buffer at every call."""

    def modulated(self, hidden_states, temb):
        if getattr(self, "buffer", None) is None:
            self.buffer = torch.empty_like(hidden_states[:1])
        return self.buffer.copy_(super().modulated(hidden_states, temb))


class BufferedProbeBlock(BufferedBlock):
    """Uses the buffer for the probe alone, which is looked at for one sample at a time."""

    def attn_input(self, hidden_states, temb):
        return Block.modulated(self, hidden_states, temb)


@pytest.mark.parametrize(("kind", "batch"), [(BufferedBlock, 1), (BufferedProbeBlock, 1), (BufferedProbeBlock, 2)])
def test_a_probe_that_is_made_in_the_same_buffer_at_every_step(kind, batch):
    config = TeaCacheConfig(threshold=0.2, coefficients=(1.0, 0.0))
    (expected,), (expected_rows,), _ = cached(toy(), config, batch=batch)
    model = toy()
    model.first[0].__class__ = kind
    (_, second), (_, rows), copies = cached(model, config, runs=2, batch=batch)
    assert copies
    assert torch.equal(second, expected)
    assert rows == expected_rows


class Copies(TorchDispatchMode):
    """Counts the operations that copy a tensor."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("clone", "copy_", "_to_copy"):
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [*MEASURING, *SCHEDULED, *NEVER, TaylorSeerConfig(interval=3)], ids=repr)
def test_a_model_that_does_not_write_in_place_costs_no_copy(config, caplog):
    with Copies() as plain:
        denoise(toy(), batch=1)
    with Copies() as watched:
        _, _, copies = cached(toy(), config, batch=1)
    assert watched.counts == plain.counts
    assert not copies
    assert not caplog.records


def test_what_was_made_once_is_made_anew_after_a_write():
    once, ids = Once(), torch.arange(3.0)
    (table,) = once("table", [ids], lambda: (ids * 2,))
    assert once("table", [ids], lambda: (ids * 2,))[0] is table
    table.mul_(5)
    (again,) = once("table", [ids], lambda: (ids * 2,))
    assert again.tolist() == [0, 2, 4]
