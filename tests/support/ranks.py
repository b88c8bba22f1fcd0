"""Processes that share the tokens of one model, on the CPU: diffusers' context parallelism over gloo.

The hooks, the splitting and the attention are diffusers' own. Three things are stood in for:

- `enable_parallelism` counts accelerators; here there is one, and the mesh is of the CPU.
- torch's attention returns no log-sum-exp, which ring attention needs to join its parts: `attention` computes both.
- gloo gathers tensors of one size only, which NCCL does not ask for: `all_gather` pads them.

Each of them waits for all ranks, as the real ones do: where one rank skips what another computes, all stop.
"""

import datetime
import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

LIMIT = 60  # seconds for a job, and for the start: a hang ends there


class Ranks:
    """`size` processes that run the same function, each as one rank."""

    def __init__(self, size: int):
        # Copies of the tests' process, which has one thread: a new process would import everything again, for 10 s.
        context = multiprocessing.get_context("fork")
        port = free_port()
        self._pipes, self._processes = [], []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(pipe)
            self._processes.append(process)

    def __call__(self, job: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """What `job(*args, **options)` returns on each rank.

        Raises:
            TimeoutError: where the ranks wait for each other; no further job can be run.
            RuntimeError: with the traceback of the first rank that failed.
        """
        for pipe in self._pipes:
            pipe.send(functools.partial(job, *args, **options))
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=LIMIT)
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(max(0.0, (deadline - datetime.datetime.now()).total_seconds())):
                self.stop()
                raise TimeoutError(f"no answer within {LIMIT} s: the ranks wait for each other")
            answers.append(pipe.recv())
        errors = [error for _, error in answers if error is not None]
        if errors:
            raise RuntimeError(errors[0])
        return [returned for returned, _ in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(rank: int, size: int, port: int, pipe: Any) -> None:
    """Run jobs as one rank until the pipe is closed."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # "cpu:gloo" and not "gloo": diffusers looks for the device in this word.
    distributed.init_process_group(
        "cpu:gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=LIMIT / 2)
    )
    stand_in()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((job(), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


def stand_in() -> None:
    """What the module's text says, for the rest of this process's life."""
    from diffusers.models import attention_dispatch

    torch.accelerator.device_count = lambda: 1
    distributed.all_gather = all_gather
    attention_dispatch._native_attention_forward_op = attention


def attention(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of tensors (B, tokens, heads, D), and with `return_lse` the log-sum-exp of its scores."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype is torch.bool else scores + attn_mask
    output = (scores.softmax(-1) @ value).transpose(1, 2)
    return (output, scores.logsumexp(-1).transpose(1, 2)) if return_lse else output


gather_of_one_size = distributed.all_gather


def all_gather(tensors: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> None:
    """`torch.distributed.all_gather` of tensors that may differ in size."""
    longest = max(each.numel() for each in tensors)
    padded = tensor.new_zeros(longest)
    padded[: tensor.numel()] = tensor.flatten()
    everywhere = [torch.empty_like(padded) for _ in tensors]
    gather_of_one_size(everywhere, padded, group=group)
    for place, values in zip(tensors, everywhere, strict=True):
        place.copy_(values[: place.numel()].view_as(place))


def share(transformer: torch.nn.Module, ring: int = 1, ulysses: int = 1, anything: bool = False) -> None:
    """Have the ranks share the tokens of `transformer`, each as many, or as near as can be with `anything`."""
    from diffusers import ContextParallelConfig

    mesh = distributed.device_mesh.init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(
        ring_degree=ring,
        ulysses_degree=ulysses,
        mesh=mesh,
        ring_anything=anything and ring > 1,
        ulysses_anything=anything and ulysses > 1,
    )
    transformer.enable_parallelism(config=config)


class Outcome(NamedTuple):
    """What a run came to: its final latents, its decisions and what they compared."""

    latents: Tensor
    decisions: list[tuple[int, str, int, str, str]]  # step, context, sample, stage, decision
    differences: dict[int, float]  # by the place of the decision, where there is one

    @property
    def hits(self) -> int:
        return sum(decision in ("hit", "forced") for *_, decision in self.decisions)


def flux(
    config: Any, shared: dict[str, Any] | None = None, late: bool = False, poisoned: int | None = None, **options: Any
) -> Outcome:
    """A run of the tiny FLUX.1.

    Args:
        config: of the cache.
        shared: arguments of `share`; None: this process has the model to itself.
        late: `share` comes after `h2cache.apply`.
        poisoned: the call of the first norm that returns NaN for the last token of all.
        options: of `loops.denoise`.
    """
    from loops import denoise
    from tiny import tiny_transformer

    transformer = tiny_transformer()
    if poisoned is not None:
        poison(transformer.transformer_blocks[0].norm1, poisoned)
    return cached(transformer, config, shared, late, lambda: denoise(transformer, **options))


def family(
    name: str, config: Any, shared: dict[str, Any] | None = None, seeds: tuple[int, ...] = (0,), guided: bool = False
) -> Outcome:
    """A run of a pipeline in tests/families."""
    import families
    from families.base import generate

    known = next(each for each in families.FAMILIES if each.name == name)
    pipe = known.build()
    return cached(pipe.transformer, config, shared, False, lambda: generate(known, pipe, seeds, guided))


def cached(
    transformer: torch.nn.Module,
    config: Any,
    shared: dict[str, Any] | None,
    late: bool,
    run: Callable[[], Tensor],
) -> Outcome:
    import h2cache

    if shared is not None and not late:
        share(transformer, **shared)
    with h2cache.apply(transformer, config) as handle:
        if late:
            share(transformer, **shared)
        latents = run()
    rows = list(handle.trace)
    decisions = [(row.step, row.context, row.sample, row.stage, str(row.decision)) for row in rows]
    return Outcome(latents, decisions, {i: row.diff for i, row in enumerate(rows) if row.diff is not None})


def poison(norm: torch.nn.Module, at: int) -> None:
    """Have call number `at` of a norm return NaN for the last token, which only the last rank has."""
    calls = count()
    is_last = not distributed.is_initialized() or distributed.get_rank() == distributed.get_world_size() - 1

    def spoil(module: torch.nn.Module, args: tuple, output: tuple[Tensor, ...]) -> None:
        if next(calls) == at and is_last:
            output[0][:, -1] = float("nan")

    norm.register_forward_hook(spoil)


def communication(config: Any, shared: dict[str, Any]) -> list[int]:
    """How many numbers each collective of the decisions brought, in a run of the tiny FLUX.1."""
    from h2cache.runtime.collectives import Ranks as Sharing

    numbers, gathered = [], Sharing.gathered

    def noted(self: Sharing, values: Tensor) -> Tensor:
        numbers.append(values.numel())
        return gathered(self, values)

    Sharing.gathered = noted
    try:
        flux(config, shared)
    finally:
        Sharing.gathered = gathered
    return numbers


def observed(lengths: tuple[int, ...], channels: int, target: int | None, shared: bool) -> float:
    """relL1 of two random sequences of parts that have these lengths: of what the ranks have, taken together."""
    from h2cache.policy.pfs import observe, relative_l1
    from h2cache.runtime.collectives import Ranks as Sharing
    from h2cache.runtime.decide import summed

    generator = torch.Generator().manual_seed(sum(lengths))
    before, then, now = (
        [torch.randn(1, length, channels, generator=generator) for length in lengths] for _ in range(3)
    )
    sharing = None
    if shared:
        size, rank = distributed.get_world_size(), distributed.get_rank()
        sharing = Sharing(distributed.group.WORLD, uneven=any(length % size for length in lengths))
        before, then, now = ([part.tensor_split(size, dim=1)[rank] for part in parts] for parts in (before, then, now))
    reference, _ = observe(then, before, target, None, sharing)
    _, deviation = observe(now, before, target, reference, sharing)
    if shared:
        deviation = deviation * reference.numel()
    return relative_l1([tuple(summed([deviation], [], sharing))])
