"""Where images are drawn: in this process, in several on the cores of a CPU, or on every GPU of a Ray cluster."""

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import torch

from h2cache.eval.errors import UserError, check_count
from h2cache.eval.files import REPOSITORY
from h2cache.eval.generation.records import Cell, Drawn
from h2cache.eval.generation.sweep import Batch, Failure, Painter, Search, Show, Watcher
from h2cache.eval.models.environment import machine_name
from h2cache.eval.models.pipelines import ModelConfig, resolve_device

if TYPE_CHECKING:
    from h2cache.eval.report.results import Tuning

ATTEMPTS = 3  # at a cell or a search whose worker dies, before it counts as failed
PATIENCE = 10  # seconds for a worker to end, once it has nothing to do
DIED_LOADING = "a worker died while it loaded the model: is there memory for all of them?"


@dataclass(frozen=True)
class LocalLauncher:
    """One pipeline in this process, or on a CPU several in processes of their own, which take a prompt each.

    Fields:
        threads: that torch computes with on the CPU; None leaves it its own choice. On cores that others use as well,
            several that wait for each other are slower than one.
        workers: processes that draw on a CPU, each with a pipeline of its own. A GPU has one.
    """

    threads: int | None = 1
    workers: int = 1

    def __post_init__(self) -> None:
        check_count("launcher.threads", self.threads, optional=True)
        check_count("launcher.workers", self.workers)

    def prepare(self) -> None:
        """Make this process one to draw in."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def machine(self, model: ModelConfig) -> str:
        self.prepare()
        return machine_name(model)

    def search(
        self, model: ModelConfig, searches: Sequence[Search], show: Show, on_machine: Callable[[str], None]
    ) -> "Iterator[tuple[Search, Tuning]]":
        """One after the other, in this process."""
        self.prepare()
        painter = Painter(model, partial(show, title="loading the model, bytes"))
        on_machine(painter.machine)
        for search in searches:
            yield search, painter.search(search, partial(show, title=f"matching {search.name}"))

    def draw(
        self, model: ModelConfig, batches: Sequence[Batch], watcher: Watcher, on_machine: Callable[[str], None]
    ) -> Iterator[tuple[Cell, Drawn | Failure]]:
        workers = min(self.workers, len(batches)) if resolve_device(model).type == "cpu" else 1
        if workers > 1:
            watcher.loads(0, 0)
            yield from _Processes(model, self.threads, on_machine).draw(batches, workers)
            return
        self.prepare()
        painter = Painter(model, watcher.loads)
        on_machine(painter.machine)
        for batch in batches:
            for cell in batch:
                watcher.begins(cell)
                yield cell, painter.draw(cell, watcher.steps)


class _Processes:
    """Processes with a pipeline each, and the cells that each has yet to draw, the one in work first.

    Each ends by itself when this process is gone: there is nobody left to talk to.
    """

    def __init__(self, model: ModelConfig, threads: int | None, on_machine: Callable[[str], None]):
        self._arguments = model, threads
        self._on_machine = on_machine
        self._context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self._deaths: Counter[Cell] = Counter()
        self._started: list[BaseProcess] = []
        self._cells: dict[Connection, deque[Cell]] = {}

    def draw(self, batches: Sequence[Batch], workers: int) -> Iterator[tuple[Cell, Drawn | Failure]]:
        waiting = deque(batches)
        try:
            for worker in [self._start() for _ in range(workers)]:
                self._cells[worker] = deque()
            while self._cells:
                for worker in wait(list(self._cells)):
                    yield from self._heard(worker, waiting)
            for process in self._started:  # which end by themselves, and give their semaphores back
                process.join(PATIENCE)
        finally:
            for process in self._started:
                process.terminate()
                process.join()

    def _start(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(*self._arguments, theirs), daemon=True)
        process.start()
        self._started.append(process)
        theirs.close()
        return ours

    def _heard(self, worker: Connection, waiting: deque[Batch]) -> Iterator[tuple[Cell, Drawn | Failure]]:
        """Hand out what a worker has drawn, and give it the next cell."""
        cells = self._cells[worker]
        try:
            said = worker.recv()
        except (EOFError, ConnectionError):
            del self._cells[worker]
            if not cells:  # it died while it loaded, perhaps for want of memory: the others draw without it
                if waiting and not self._cells:
                    raise UserError(DIED_LOADING) from None
                return
            yield from _buried(cells, self._deaths)
            if cells:
                waiting.appendleft(tuple(cells))
            if waiting:
                self._cells[self._start()] = deque()
            return
        if isinstance(said, UserError):
            raise said
        if isinstance(said, str):
            self._on_machine(said)
        else:
            yield cells.popleft(), said
        while waiting and not cells:
            cells.extend(waiting.popleft())
        if cells:
            with suppress(ConnectionError):  # it died just now: the next thing heard from it is its end
                worker.send(cells[0])
        else:
            del self._cells[worker]
            worker.close()


def _work(model: ModelConfig, threads: int | None, parent: Connection) -> None:
    """A process that says its machine's name, or why it has none, and draws each cell that it is sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    with suppress(EOFError, ConnectionError):  # the parent is gone, or needs nothing more
        try:
            LocalLauncher(threads).prepare()
            painter = Painter(model)
        except UserError as error:
            parent.send(error)
            return
        parent.send(painter.machine)
        while True:
            parent.send(painter.draw(parent.recv()))


@dataclass(frozen=True)
class RayLauncher:
    """A pool of Ray actors, each with a pipeline of its own; a task is a prompt with all of its settings, or a search.

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

    def machine(self, model: ModelConfig) -> str:
        with self._pool(model) as pool:
            return pool.machine()

    def search(
        self, model: ModelConfig, searches: Sequence[Search], show: Show, on_machine: Callable[[str], None]
    ) -> "Iterator[tuple[Search, Tuning | Failure]]":
        """As many at a time as there are workers: all are as busy as they are while images are drawn."""
        with self._pool(model) as pool:
            tasks = [(search,) for search in searches]
            for done, found in enumerate(pool.work(Painter.search, tasks, on_machine), start=1):
                show(done, len(tasks), title="matching settings")
                yield found

    def draw(
        self, model: ModelConfig, batches: Sequence[Batch], watcher: Watcher, on_machine: Callable[[str], None]
    ) -> Iterator[tuple[Cell, Drawn | Failure]]:
        watcher.loads(0, 0)
        with self._pool(model) as pool:
            yield from pool.work(Painter.draw, batches, on_machine)

    @contextmanager
    def _pool(self, model: ModelConfig) -> "Iterator[_Pool]":
        """The workers, for as long as the block lasts. UserError where they cannot be had."""
        if model.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"model.device={model.device}: Ray gives each worker its own GPU; use model.device=auto")
        with self._connected() as ray:
            count, gpus = self._size(ray.cluster_resources(), model)
            yield _Pool(ray, model, count, {"num_cpus": self.cpus_per_worker, "num_gpus": gpus})

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

    def machine(self, model: ModelConfig) -> str:
        """The machine's name, without the model."""
        return machine_name(model)

    def load(self, model: ModelConfig) -> str:
        """The machine's name."""
        self._painter = Painter(model)
        return self._painter.machine

    def work(self, work: Callable[[Painter, Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        for item in items:
            yield work(self._painter, item)


class _Pool:
    """Workers, and what each is at: a stream of results and the items that have yet to come out of it."""

    def __init__(self, ray: Any, model: ModelConfig, count: int, resources: dict[str, int]):
        self._ray = ray
        self._model = model
        self._count = count
        self._actor = ray.remote(**resources)(Worker)

    def machine(self) -> str:
        """That of one worker."""
        with self._starting():
            return self._ray.get(self._actor.remote().machine.remote(self._model))

    def work(
        self, work: Callable[[Painter, Any], Any], tasks: Sequence[Sequence[Any]], on_machine: Callable[[str], None]
    ) -> Iterator[tuple[Any, Any]]:
        """Each item of each task with what `work` makes of it; a worker takes one task at a time, item by item."""
        waiting, deaths = deque(tasks), Counter()
        running: dict[Any, tuple[Any, deque[Any]]] = {}

        def give(worker: Any, items: Sequence[Any]) -> None:
            stream = worker.work.options(num_returns="streaming").remote(work, tuple(items))
            running[stream] = worker, deque(items)

        for worker in self._started(min(self._count, len(tasks)), on_machine):
            give(worker, waiting.popleft())
        while running:
            (stream, *_), _ = self._ray.wait(list(running), num_returns=1)
            worker, items = running[stream]
            try:
                outcome = self._ray.get(next(stream))
            except StopIteration:
                del running[stream]
                if waiting:
                    give(worker, waiting.popleft())
            except self._ray.exceptions.RayActorError:
                del running[stream]
                yield from _buried(items, deaths)
                if items or waiting:
                    (worker,) = self._started(1, on_machine)
                    give(worker, items or waiting.popleft())
            else:
                yield items.popleft(), outcome

    def _started(self, count: int, on_machine: Callable[[str], None]) -> list[Any]:
        """Workers that have loaded the model, side by side. UserError if they cannot."""
        workers = [self._actor.remote() for _ in range(count)]
        with self._starting():
            machines = self._ray.get([worker.load.remote(self._model) for worker in workers])
        for machine in machines:
            on_machine(machine)
        return workers

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """What ends a worker's first call is raised as it was raised there, or is a UserError."""
        try:
            yield
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        except self._ray.exceptions.RayActorError as error:
            raise UserError(DIED_LOADING) from error


def _buried(items: deque[Any], deaths: Counter[Any]) -> Iterator[tuple[Any, Failure]]:
    """Hand out the first item of a dead worker, which it died of, if it was not the first to."""
    if not items:
        return
    deaths[items[0]] += 1
    if deaths[items[0]] >= ATTEMPTS:
        reason = f"its worker died, {ATTEMPTS} times"
        yield items.popleft(), Failure(reason, reason)
