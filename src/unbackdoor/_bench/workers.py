"""The workers: this process, local processes, or a Ray cluster. All three are executors of concurrent.futures."""

import logging
import math
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Protocol

from unbackdoor._bench.schema import Resources
from unbackdoor._errors import UnbackdoorError
from unbackdoor._interrupts import exit_code, heeded
from unbackdoor._processors import usable

# The errors of concurrent.futures and Ray for a job whose worker died, not for one that failed.
_LOST = {"BrokenProcessPool", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ObjectLostError"}

# What a job imports, which takes eight seconds: one process does it once, and the workers are its copies.
_IMPORTED = ["torch._dynamo", "datasets", "unbackdoor._bench.work", "unbackdoor.archs._resnet"]


def lost(future: "Future[Any]") -> bool:
    """Whether the worker of a job died."""
    return type(future.exception()).__name__ in _LOST


class Workers(Protocol):
    """A place to submit jobs to.

    Args:
        slots: number of jobs that may be in flight.
        together: whether all jobs in flight are lost if a worker dies.
    """

    slots: int
    together: bool

    def submit(self, job: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Start a job."""

    def renew(self) -> None:
        """Replace workers that died, unless the cluster does that."""

    def stop(self) -> None:
        """Shut down, without waiting for running jobs."""


class Here:
    """This process, one job at a time."""

    slots = 1
    together = False

    def submit(self, job: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Do the job now."""
        future: Future[Any] = Future()
        try:
            future.set_result(job(*arguments))
        except Exception as problem:
            future.set_exception(problem)
        return future

    def renew(self) -> None:
        """Do nothing: no worker can die."""

    def stop(self) -> None:
        """Do nothing: no job is running."""


class Processes:
    """Local processes, which share the cores: copies of one that has imported what they need and done nothing else."""

    together = True

    def __init__(self, count: int) -> None:
        self.slots = count
        self.last: list[Future[Any]] = []  # submitted jobs that were not done at the time
        self.renew()

    def submit(self, job: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Hand the job to a free process."""
        self.last = [*(future for future in self.last if not future.done()), self.pool.submit(_worked, job, *arguments)]
        return self.last[-1]

    def renew(self) -> None:
        """Start a new pool: one that lost a process takes no more jobs."""
        copied = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if copied else "spawn")
        if copied:
            context.set_forkserver_preload(_IMPORTED)
        settings = (threads_of(self.slots), dict(os.environ))
        self.pool = ProcessPoolExecutor(self.slots, context, initializer=_begin, initargs=settings)

    def stop(self) -> None:
        """End the processes: an unfinished job leaves nothing behind."""
        if any(not future.done() for future in self.last):
            for process in list((self.pool._processes or {}).values()):
                process.terminate()
        self.pool.shutdown(cancel_futures=True)


def threads_of(workers: int) -> int:
    """Returns the number of threads of each local worker: its share of the cores whose time this process may use."""
    allowed = usable()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(allowed // workers, int(threads) if threads.isdecimal() and int(threads) > 0 else allowed))


def _begin(threads: int, environment: dict[str, str]) -> None:
    """Set a new worker up: its environment and share of the cores, no output, and an end when its parent ends."""
    import torch

    os.environ.update(environment)  # what it is a copy of may be older than a variable
    torch.set_num_threads(threads)
    quiet()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _worked(job: Callable[..., Any], *arguments: Any) -> Any:
    """Do a job; if `stop` ends this process meanwhile, what the job was writing is removed first."""
    with heeded((signal.SIGTERM,)) as heard:
        try:
            return job(*arguments)
        except BaseException:
            if heard:
                os._exit(exit_code())
            raise


def quiet(level: int = logging.ERROR) -> int:
    """Leave warnings to the records, which keep them: on the terminal their cell would not be known.

    Returns:
        The level that the logger had before.
    """
    logger = logging.getLogger("unbackdoor")
    before = logger.level
    logger.setLevel(level)
    return before


class Cluster:
    """A Ray cluster. Ray places the jobs, and restarts those of a lost node elsewhere."""

    together = False

    def __init__(self, address: str, resources: Resources) -> None:
        try:
            import ray
        except ImportError:
            raise UnbackdoorError("`ray` needs Ray. Install unbackdoor[ray], or use `workers`.") from None
        self.ray = ray
        try:
            if address != "auto":  # Ray itself tries for minutes
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except (OSError, ValueError, RuntimeError) as problem:
            reason = str(problem).split("\n")[0].rstrip(".")
            raise UnbackdoorError(
                f"`ray={address!r}` cannot be reached ({reason}). Start it: ray start --head."
            ) from None
        self.remote = ray.remote(_remotely).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=3, retry_exceptions=False
        )
        self.threads = max(1, math.floor(resources.cpus))
        # More than the cluster can run, so that one that grows by demand sees it.
        self.slots = max(64, 2 * int(ray.cluster_resources().get("CPU", 1)))

    def submit(self, job: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Hand the job to Ray."""
        future: Future[Any] = self.remote.remote(self.threads, job, *arguments).future()
        return future

    def renew(self) -> None:
        """Do nothing: Ray does that itself."""

    def stop(self) -> None:
        """Leave the cluster, which ends the running jobs of this process."""
        self.ray.shutdown()


def _remotely(threads: int, job: Callable[..., Any], *arguments: Any) -> Any:
    import torch

    torch.set_num_threads(threads)
    quiet()
    return job(*arguments)
