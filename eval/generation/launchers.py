"""Where images are drawn: in this process, or by one worker for each GPU of a Ray cluster."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from eval.errors import UserError, check_count
from eval.files import REPOSITORY
from eval.generation.records import Cell, Drawn
from eval.generation.sweep import Batch, Failure, Painter, Watcher
from eval.models.pipelines import ModelConfig

ATTEMPTS = 3  # at a cell whose worker dies, before it counts as failed


@dataclass(frozen=True)
class LocalLauncher:
    """One pipeline, here.

    Fields:
        threads: that torch computes with on the CPU; None leaves it its own choice. On cores that others use as well,
            several that wait for each other are slower than one.
    """

    threads: int | None = 1

    def __post_init__(self) -> None:
        check_count("launcher.threads", self.threads, optional=True)

    def prepare(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def draw(
        self, model: ModelConfig, batches: Sequence[Batch], watcher: Watcher, on_machine: Callable[[str], None]
    ) -> Iterator[tuple[Cell, Drawn | Failure]]:
        self.prepare()
        painter = Painter(model)
        on_machine(painter.machine)
        for batch in batches:
            for cell in batch:
                watcher.begins(cell)
                yield cell, painter.draw(cell, watcher.steps)


@dataclass(frozen=True)
class RayLauncher:
    """A pool of Ray actors, each with a pipeline of its own; a task is a prompt with all of its settings.

    A worker that dies is replaced, and what it had not handed out is drawn again. Only the driver writes records; the
    workers need this repository and the model at the same paths.

    Fields:
        address: of the cluster ("auto", "ray://head:10001"); None starts one on this machine, for as long as it draws.
        workers: how many. None: one for each GPU of the cluster, or without GPUs as many as its CPUs allow.
        cpus_per_worker: cores, and threads of torch, that each takes.
    """

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: int = 1

    def __post_init__(self) -> None:
        check_count("launcher.workers", self.workers, optional=True)
        check_count("launcher.cpus_per_worker", self.cpus_per_worker)

    def prepare(self) -> None:
        raise UserError("match: speedups are measured where images are drawn, one after the other: use launcher=local")

    def draw(
        self, model: ModelConfig, batches: Sequence[Batch], watcher: Watcher, on_machine: Callable[[str], None]
    ) -> Iterator[tuple[Cell, Drawn | Failure]]:
        if model.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"model.device={model.device}: Ray gives each worker its own GPU; use model.device=auto")
        with self._connected() as ray:
            count, gpus = self._size(ray.cluster_resources(), model)
            pool = _Pool(ray, model, on_machine, {"num_cpus": self.cpus_per_worker, "num_gpus": gpus})
            yield from pool.draw(batches, min(count, len(batches)))

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise UserError("launcher=ray needs Ray: pip install 'ray>=2.40', or use launcher=local") from error
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
        if self.address is None:
            options |= {"address": "local", "include_dashboard": False}
            if self.workers:
                options["num_cpus"] = self.workers * self.cpus_per_worker
        else:
            options["address"] = self.address
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # a cluster can be out of reach in more ways than can be listed
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"launcher.address={self.address}: cannot connect to Ray ({reason})") from error
        try:
            yield ray
        finally:
            ray.shutdown()

    def _size(self, resources: dict[str, float], model: ModelConfig) -> tuple[int, int]:
        """(workers, GPUs of each). UserError if the cluster has not that much."""
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        on_gpu = model.device == "cuda" or (model.device == "auto" and gpus > 0)
        room = min(cpus // self.cpus_per_worker, gpus if on_gpu else cpus)
        if room < (self.workers or 1):
            raise UserError(
                f"Ray has {cpus} CPUs and {gpus} GPUs, too few for {self.workers or 1} workers with "
                f"{self.cpus_per_worker} CPUs{' and a GPU' if on_gpu else ''} each: change launcher.workers or "
                "launcher.cpus_per_worker"
            )
        return self.workers or room, int(on_gpu)


class Worker:
    """The actor. It loads in a call of its own, whose exceptions reach the driver as they are."""

    def load(self, model: ModelConfig) -> str:
        """The machine's name."""
        self._painter = Painter(model)
        return self._painter.machine

    def draw(self, cells: Batch) -> Iterator[Drawn | Failure]:
        for cell in cells:
            yield self._painter.draw(cell)


class _Pool:
    """Workers, and what each is drawing: a stream of results and the cells that have yet to come out of it."""

    def __init__(self, ray: Any, model: ModelConfig, on_machine: Callable[[str], None], resources: dict[str, int]):
        self._ray = ray
        self._model = model
        self._on_machine = on_machine
        self._actor = ray.remote(**resources)(Worker)
        self._deaths: Counter[Cell] = Counter()
        self._running: dict[Any, tuple[Any, deque[Cell]]] = {}

    def draw(self, batches: Sequence[Batch], workers: int) -> Iterator[tuple[Cell, Drawn | Failure]]:
        waiting = deque(batches)
        for worker in self._started(workers):
            self._give(worker, waiting.popleft())
        while self._running:
            (stream, *_), _ = self._ray.wait(list(self._running), num_returns=1)
            worker, cells = self._running[stream]
            try:
                outcome = self._ray.get(next(stream))
            except StopIteration:
                del self._running[stream]
                if waiting:
                    self._give(worker, waiting.popleft())
            except self._ray.exceptions.RayActorError:
                del self._running[stream]
                yield from self._bury(cells)
                if cells or waiting:
                    (worker,) = self._started(1)
                    self._give(worker, cells or waiting.popleft())
            else:
                yield cells.popleft(), outcome

    def _give(self, worker: Any, cells: Sequence[Cell]) -> None:
        stream = worker.draw.options(num_returns="streaming").remote(tuple(cells))
        self._running[stream] = worker, deque(cells)

    def _bury(self, cells: deque[Cell]) -> Iterator[tuple[Cell, Failure]]:
        """Hand out the cell that a worker died of, if it is not the first."""
        if not cells:
            return
        self._deaths[cells[0]] += 1
        if self._deaths[cells[0]] >= ATTEMPTS:
            reason = f"its worker died, {ATTEMPTS} times"
            yield cells.popleft(), Failure(reason, reason)

    def _started(self, count: int) -> list[Any]:
        """Workers that have loaded the model, side by side. UserError if they cannot."""
        workers = [self._actor.remote() for _ in range(count)]
        try:
            machines = self._ray.get([worker.load.remote(self._model) for worker in workers])
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        except self._ray.exceptions.RayActorError as error:
            raise UserError("a worker died while it loaded the model: is there memory for all of them?") from error
        for machine in machines:
            self._on_machine(machine)
        return workers
