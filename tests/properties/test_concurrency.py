"""Rule 2: several runs at once on one transformer, taking turns or in threads."""

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from interruptions import Interruption, break_off_between_steps, called_at_every_step
from loops import denoise, denoising
from methods_under_test import every_method, every_method_once
from pictures import alone, is_mixed, own_pipeline, picture
from tiny import tiny_transformer

import h2cache
from h2cache import Decision
from h2cache.trace import KEPT_RUNS, Row, Trace


@every_method_once("pattern", {pattern: pattern for pattern in ("ABC", "AABBC", "ABBBBBCA")}, most="AABBC")
def test_interleaved_runs_on_one_transformer(config, pattern, transformer):
    """Three loops take turns in a pattern: one shape twice, and a batch of another size."""
    requests = {"A": dict(seed=0), "B": dict(seed=1), "C": dict(seed=2, batch=2, height=2)}
    expected = {}
    for name, request in requests.items():
        with h2cache.apply(transformer, config):
            expected[name] = denoise(transformer, **request)
    with h2cache.apply(transformer, config) as handle:
        loops = {name: denoising(transformer, **request) for name, request in requests.items()}
        last = {}
        while loops:
            for name in pattern:
                if name in loops:
                    latents = next(loops[name], None)
                    if latents is None:
                        del loops[name]
                    else:
                        last[name] = latents
        for name, latents in expected.items():
            assert torch.equal(last[name], latents), name
        assert is_mixed(handle)


def in_threads(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks return, each run in a thread of its own."""
    results: list[Any] = [None] * len(tasks)

    def work(number: int) -> None:
        try:
            results[number] = tasks[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


REQUESTS = [dict(prompt="a red stop sign", seed=0), dict(prompt=["a blue shirt", "a label"], seed=1)]


@every_method
def test_two_pipelines_in_two_threads_on_one_transformer(config, tiny_pipe):
    """The threads meet in the middle of every call, so that each is inside a call while the other decides."""
    pipes = [own_pipeline(tiny_pipe), own_pipeline(tiny_pipe)]
    expected = [alone(pipe, config, **request) for pipe, request in zip(pipes, REQUESTS, strict=True)]
    barrier = threading.Barrier(2, timeout=20)

    def meet(*_: Any) -> None:
        barrier.wait()

    with h2cache.apply(tiny_pipe, config) as handle:
        hooks = [part.register_forward_hook(meet) for part in called_at_every_step(config, tiny_pipe.transformer)]
        try:
            drawn = in_threads(
                *(lambda pipe=p, request=r: picture(pipe, **request) for p, r in zip(pipes, REQUESTS, strict=True))
            )
        finally:
            for hook in hooks:
                hook.remove()
        assert handle.summary()["runs"] == 2 and is_mixed(handle)
    for image, reference in zip(drawn, expected, strict=True):
        assert torch.equal(image, reference)


@every_method
def test_two_pipelines_in_two_threads_on_two_transformers(config, tiny_pipe):
    pipes = [own_pipeline(tiny_pipe, transformer=tiny_transformer(seed=seed)) for seed in (3, 4)]
    expected = [alone(pipe, config, **request) for pipe, request in zip(pipes, REQUESTS, strict=True)]
    handles = [h2cache.apply(pipe, config) for pipe in pipes]
    barrier = threading.Barrier(2, timeout=20)

    def meet(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        barrier.wait()
        return tensors

    drawn = in_threads(
        *(
            lambda pipe=p, request=r: picture(pipe, **request, callback_on_step_end=meet)
            for p, r in zip(pipes, REQUESTS, strict=True)
        )
    )
    for image, reference, handle in zip(drawn, expected, handles, strict=True):
        assert torch.equal(image, reference)
        assert handle.summary()["runs"] == 1 and handle.held_bytes() == 0


@every_method
def test_a_thread_that_fails_leaves_the_other_alone(config, tiny_pipe):
    pipes = [own_pipeline(tiny_pipe), own_pipeline(tiny_pipe)]
    expected = alone(pipes[1], config, steps=12)
    failed = threading.Event()

    def wait(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            assert failed.wait(20)
        return tensors

    def fail() -> None:
        break_off_between_steps(pipes[0], Interruption)
        gc.collect()
        failed.set()

    with h2cache.apply(tiny_pipe, config):
        _, drawn = in_threads(fail, lambda: picture(pipes[1], steps=12, callback_on_step_end=wait))
    assert torch.equal(drawn, expected)


def test_the_record_of_several_threads():
    """Threads note their decisions in one trace while it is read, switching after nearly every instruction."""
    trace = Trace()
    trace.expect(["network"])
    numbers: list[int] = []

    def note() -> None:
        for _ in range(5000):
            number = trace.begin_run({"network": 5}, total_blocks=5)
            trace.rows_of(number).append(Row(number, 0, 1.0, "cond", 0, "network", None, 0.1, Decision.WARMUP, 5))
            trace.rows_of(max(0, number - 3))
            numbers.append(number)

    def read() -> None:
        for _ in range(500):
            list(trace)
            len(trace)
            trace.summary()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(note, note, note, read)
    finally:
        sys.setswitchinterval(interval)
    assert sorted(numbers) == list(range(15_000)), "no two runs share a number"
    assert len(trace) == KEPT_RUNS
