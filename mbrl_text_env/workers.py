"""Distribute work with Ray: actors with their own models, on one or many machines.

The work can be any function. It is pickled once; jobs and results are sent one by one, and only the
calling process writes files. Ray is the extra `ray`.
"""

from __future__ import annotations

import os
import pickle
import socket
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from mbrl_text_env._lazy import extras
from mbrl_text_env.files import shortened
from mbrl_text_env.rewards import registry
from mbrl_text_env.runs import folder_digest
from mbrl_text_env.types import check_positive

Job = TypeVar("Job")
T = TypeVar("T")

# After this many lost workers, the job they were doing is assumed to be the cause.
_MOST_LOST = 3
_PATIENCE_SECONDS = 60.0
_ANSWER_SECONDS = 10.0


class WorkerError(RuntimeError):
    """Workers cannot start, or are lost repeatedly."""


class RayWorkers:
    """Ray actors that do jobs in parallel, each with its own models.

    Use it as a context manager, and pass it to `compare`, `collect` or `ExpertIteration` as `each`.
    The results are the same as with one process: the batches are the same, and each worker loads
    the language model from the same source, which is checked. If a worker is lost, another one does
    its job, and a new worker starts. Code, models and reward files must be at the same path on
    every machine.

    Args:
        address: Address of a Ray cluster, `"auto"` for the cluster of this machine, or `"local"` to
            start a temporary one here. If this process is already connected to Ray, that is used.
        workers: Number of workers. Each takes one CPU, or in a local Ray its share of the cores.
        gpus_per_worker: GPUs per worker; with a fraction such as 0.5, workers share a GPU.

    Raises:
        MissingExtraError: Ray is not installed.
        WorkerError: On entering: there is no such cluster, or its resources are too small. While
            working: several workers were lost by the same job or by loading the models.

    Example:
        >>> with RayWorkers("local", 2) as workers:  # doctest: +SKIP
        ...     compare(comparison, "out", each=workers)
    """

    def __init__(self, address: str, workers: int, *, gpus_per_worker: float = 0.0) -> None:
        check_positive(workers=workers)
        self.address, self.workers, self.gpus_per_worker = address, workers, gpus_per_worker

    def __enter__(self) -> Self:
        # Ray would send usage statistics over the network.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # By default, Ray gives its workers a low priority.
        os.environ.setdefault("RAY_worker_niceness", "0")
        with extras():
            import ray
        self._ray: Any = ray
        self._is_ours = not ray.is_initialized()
        is_local = self.address == "local"
        cpus = max(1, (os.cpu_count() or 1) // self.workers) if is_local else 1
        here = {"num_cpus": cpus * self.workers, "include_dashboard": False} if is_local else {}
        if self._is_ours:
            try:
                _check_answers(self.address)
                self._ray.init(self.address, log_to_driver=False, logging_level="error", **here)
            # Ray exits the program if a cluster does not answer.
            except (Exception, SystemExit) as error:
                raise WorkerError(
                    f"Ray at {self.address!r}: expected a cluster to join, got "
                    f"{type(error).__name__}: {shortened(str(error), 300)}. Begin one "
                    "(`ray start --head`) and give its HOST:PORT, or 'auto' on one of its "
                    "machines; 'local' needs none."
                ) from error
        try:
            self._check_room({"CPU": cpus, "GPU": self.gpus_per_worker})
        except BaseException:
            self.__exit__()
            raise
        needs = {"num_cpus": cpus, "num_gpus": self.gpus_per_worker}
        self._actor = ray.remote(_Worker).options(**needs)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            self._ray.shutdown()

    def __call__(self, work: Callable[[Job], T], jobs: Sequence[Job]) -> Iterator[tuple[int, T]]:
        """Yield the index and result of each job when it is done; errors of the work are raised.

        Work, jobs and results must be picklable.
        """
        if not jobs:
            return
        # Where Ray holds the work, with the files whose code it has.
        files = {str(path): folder_digest(path) for path in registry.files_run()}
        packed = self._ray.put((files, self._ray.cloudpickle.dumps(work)))
        crew = _Crew(self._ray, self._actor, packed)
        try:
            for _ in range(min(self.workers, len(jobs))):
                crew.begin()
            waiting, undone = deque(range(len(jobs))), len(jobs)
            while undone:
                while crew.idle and waiting:
                    place = waiting.popleft()
                    crew.give(place, jobs[place])
                done, result = crew.next()
                if done is not None and result is None:
                    waiting.appendleft(done)
                if len(waiting) > len(crew.idle) and crew.size < self.workers:
                    crew.begin()
                if done is not None and result is not None:
                    undone -= 1
                    yield done, result[0]
        finally:
            crew.end()

    def _check_room(self, needs: dict[str, float]) -> None:
        there = self._ray.cluster_resources()
        for kind, each in needs.items():
            if each * self.workers > there.get(kind, 0):
                raise WorkerError(
                    f"Ray at {self.address!r}: expected {each * self.workers:g} {kind}s for "
                    f"{self.workers} workers, got {there.get(kind, 0):g}. Ask for fewer workers, "
                    "for less of each, or add machines to the cluster."
                )


def _check_answers(address: str) -> None:
    """Raise OSError or ValueError if nothing answers at the address; Ray would take minutes."""
    if address not in ("local", "auto"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()


class _Crew:
    """The actors of one piece of work, and their current jobs."""

    def __init__(self, ray: Any, actor: Any, packed: Any) -> None:
        self._ray, self._actor, self._packed = ray, actor, packed
        self.idle: list[Any] = []
        # By what Ray will say of it: the actor, and the place of its job; None while it loads.
        self._running: dict[Any, tuple[Any, int | None]] = {}
        self._lost = Counter[int | None]()

    @property
    def size(self) -> int:
        return len(self.idle) + len(self._running)

    def begin(self) -> None:
        # In a list, Ray passes on where the work lies, and not the work.
        actor = self._actor.remote([self._packed])
        self._running[actor.begin.remote()] = actor, None

    def give(self, place: int, job: Any) -> None:
        actor = self.idle.pop()
        self._running[actor.do.remote(job)] = actor, place

    def next(self) -> tuple[int | None, tuple[Any] | None]:
        """The next job that is done or lost, and its result in a tuple; None for loading."""
        ready: list[Any] = []
        while not ready:
            ready, _ = self._ray.wait(list(self._running), timeout=_PATIENCE_SECONDS)
            if not ready and not self.idle and {p for _, p in self._running.values()} == {None}:
                warnings.warn(
                    f"No worker is ready after {_PATIENCE_SECONDS:g} s: of the cluster's "
                    f"{self._ray.cluster_resources()}, {self._ray.available_resources()} is free.",
                    stacklevel=3,
                )
        actor, place = self._running.pop(ready[0])
        try:
            result = self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
        except self._ray.exceptions.RayError as error:
            self._note_loss(actor, place, error)
            return place, None
        if place is None:
            del self._lost[None]
        self.idle.append(actor)
        return place, (result,)

    def _note_loss(self, actor: Any, place: int | None, error: Exception) -> None:
        reason = f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 300)}"
        self._ray.kill(actor)
        self._lost[place] += 1
        doing = "loading the models" if place is None else f"doing job {place}"
        if self._lost[place] >= _MOST_LOST:
            raise WorkerError(
                f"{_MOST_LOST} workers were lost while {doing}, the last one by {reason}. That is "
                "most often memory: give each worker more, or lower the batch size."
            ) from error
        warnings.warn(
            f"A worker was lost while {doing}; another one does it ({reason}).", stacklevel=4
        )

    def end(self) -> None:
        for actor in [*self.idle, *(actor for actor, _ in self._running.values())]:
            # What ends the whole program may have ended them.
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)


class _Worker:
    """An actor that unpickles the work once and applies it to jobs."""

    def __init__(self, packed: list[Any]) -> None:
        self._packed = packed
        self._work: Any = None

    def begin(self) -> None:
        """Load the models."""
        import ray

        files, work = ray.get(self._packed[0])
        for path, digest in files.items():
            if not Path(path).is_file() or folder_digest(path) != digest:
                raise WorkerError(
                    f"{path}: expected the file that the rewards came from on every machine, got "
                    "none, or another one. Copy it there, or use a folder that all machines share."
                )
            registry.run_file(Path(path))
        self._work = pickle.loads(work)  # noqa: S301 - from the process that began this one

    def do(self, job: Any) -> Any:
        """The result of a job."""
        return self._work(job)
