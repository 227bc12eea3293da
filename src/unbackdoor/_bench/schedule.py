"""The order of jobs: a victim after its surrogate, a cell after its victim, a control after its triggers."""

from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from unbackdoor._bench import work
from unbackdoor._bench.grid import Grid
from unbackdoor._bench.plan import Plan
from unbackdoor._bench.progress import Progress
from unbackdoor._bench.subjects import PlannedCell, Subject
from unbackdoor._bench.workers import Workers, lost
from unbackdoor._errors import IncompleteError


@dataclass(eq=False)
class Job:
    """A victim to train or a cell to measure.

    Args:
        what: the victim or the cell.
        needs: keys of victims that must have been tried before.
        wait: another process was working on it at the first try, so the next try waits for that process.
        lost: a worker died while working on it, so the next try runs alone.
    """

    what: Subject | PlannedCell
    needs: frozenset[str]
    wait: bool = False
    lost: bool = False


class JobSchedule:
    """Hands jobs to workers until none is left.

    Args:
        grid: the grid, which has the settings of the jobs.
        todo: the jobs.
        name: name of the grid in the store.
        address: address of the store.
        crew: the workers.
        progress: counts the jobs.
    """

    def __init__(self, grid: Grid, todo: Plan, name: str, address: str, crew: Workers, progress: Progress) -> None:
        self.settings = work.Settings(store=address, grid=name, device=grid.resources.device)
        self.todo, self.crew, self.progress = todo, crew, progress
        self.first = ""  # message of the first failure
        self.untried = {victim.key for victim in todo.victims}
        self.broken: dict[str, str] = {}  # victims that failed, and why
        cells: dict[str, list[PlannedCell]] = {}
        for cell in todo.cells:
            cells.setdefault(cell.subject.key, []).append(cell)
        self.jobs = [self._cell_job(cell) for cell in todo.cells if cell.subject.key not in self.untried]
        for victim in todo.victims:
            surrogate = todo.surrogates.get(victim.key)
            self.jobs.append(Job(victim, frozenset([surrogate.key] if surrogate else []) & self.untried))
            # A victim's cells follow it, so that a run that is cut short has whole rows to show.
            self.jobs += map(self._cell_job, cells.get(victim.key, []))

    def _cell_job(self, cell: PlannedCell) -> Job:
        return Job(cell, frozenset(subject.key for subject in (*cell.needs, *cell.others)) & self.untried)

    def run(self) -> None:
        """Run all jobs.

        Raises:
            IncompleteError: the disk is full.
        """
        flying: dict[Future[Any], Job] = {}
        try:
            while self.jobs or flying:
                while len(flying) < self.crew.slots and (job := self._next(alone=not flying)) is not None:
                    future = self._start(job)
                    if future is not None:
                        flying[future] = job
                    if job.lost:
                        break
                if not flying:
                    continue
                finished, _ = wait(flying, return_when=FIRST_COMPLETED)
                if any(lost(future) for future in finished) and self.crew.together:
                    finished, _ = wait(flying)
                    self.crew.renew()
                for future in finished:
                    self._take(future, flying.pop(future))
        finally:
            for future in flying:
                future.cancel()

    def _next(self, *, alone: bool) -> Job | None:
        """Returns the first job that may start; one that lost its worker waits for all others to end."""
        ready = (job for job in self.jobs if not job.needs & self.untried)
        chosen = next((job for job in ready if not job.lost), None)
        if chosen is None and alone:
            chosen = next((job for job in self.jobs if job.lost), None)
        if chosen is not None:
            self.jobs.remove(chosen)
        return chosen

    def _start(self, job: Job) -> Future[Any] | None:
        if isinstance(job.what, Subject):
            self.progress.started()
            surrogate = self.todo.surrogates.get(job.what.key)
            if surrogate is not None and surrogate.key in self.broken:
                surrogate = None
            return self.crew.submit(work.train, job.what, surrogate, self.settings, job.wait)
        broken = self.broken.get(job.what.subject.key)
        self.progress.started()
        if broken is not None:
            self._ended(job, work.fail(job.what, self.settings, f"Its victim failed: {broken}"))
            return None
        force = job.what.key in self.todo.forced
        return self.crew.submit(work.measure, job.what, self.settings, force, job.wait)

    def _take(self, future: Future[Any], job: Job) -> None:
        if not lost(future):
            problem = future.exception()
            if problem is not None:
                cause = getattr(problem, "cause", problem)  # Ray wraps it
                raise cause if isinstance(cause, IncompleteError) else problem
            self._ended(job, future.result())
        elif not job.lost:
            job.lost = True
            self.jobs.append(job)
            self.progress.again()
        else:
            message = "Its worker died twice, the second time alone; probably it ran out of memory."
            failed = work.Outcome("failed", 0.0, message)
            self._ended(job, failed if isinstance(job.what, Subject) else work.fail(job.what, self.settings, message))

    def _ended(self, job: Job, outcome: work.Outcome) -> None:
        if outcome.kind == "busy":
            job.wait = True
            self.jobs.append(job)
            self.progress.again()
            return
        self.first = self.first or outcome.message
        if isinstance(job.what, Subject):
            self.untried.discard(job.what.key)
            if outcome.kind == "failed":
                self.broken[job.what.key] = outcome.message
        self.progress.ended(job.what, cell=isinstance(job.what, PlannedCell), problem=outcome.message)
