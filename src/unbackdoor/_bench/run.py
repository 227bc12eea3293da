"""The `bench` command: plan, run the missing cells, keep each result, report the counts."""

import statistics
from pathlib import Path

from unbackdoor._artifacts.cell import Failed
from unbackdoor._bench import plan as planning
from unbackdoor._bench.grid import Grid, kept, read
from unbackdoor._bench.plan import Plan
from unbackdoor._bench.progress import Progress
from unbackdoor._bench.store import Store
from unbackdoor._bench.workers import Cluster, Here, Processes, Workers, quiet
from unbackdoor._errors import SENTENCE, IncompleteError, UnbackdoorError, printable
from unbackdoor._interrupts import cause, exit_code
from unbackdoor._progress import duration


class Interrupted(UnbackdoorError):
    """Ctrl-C or another signal; finished cells are kept."""

    def __init__(self) -> None:
        super().__init__(f"{cause()}; finished cells are kept. Start the same command to go on.")
        self.exit_code = exit_code()


def bench(
    path: str,
    *,
    out: str,
    rerun: str = "missing",
    workers: int = 1,
    ray: str | None = None,
    only: tuple[str, ...] = (),
    dry_run: bool = False,
) -> None:
    """Run a grid.

    Raises:
        UnbackdoorError: the grid has problems, or the store cannot be used.
        IncompleteError: cells failed, or the disk is full.
    """
    try:
        _bench(path, out, rerun, workers, ray, only, dry_run)
    except KeyboardInterrupt:
        raise Interrupted from None


def _bench(
    path: str, out: str, rerun: str, workers: int, ray: str | None, only: tuple[str, ...], dry_run: bool
) -> None:
    if workers < 1:
        raise UnbackdoorError(f"`workers` must be at least 1, got {workers}.")
    if ray is not None and workers != 1:
        raise UnbackdoorError("bench takes `workers` or `ray`, got both. Leave one out.")
    grid = read(path)
    store = Store(out)
    todo = planning.plan(grid, store, rerun, only)
    if dry_run:
        _tell(todo, store, workers)
        return
    if todo.cells:
        _run_grid(grid, store, todo, workers, ray)
    else:
        print(f"Nothing to do: {todo.total:,} cells, none of them {'chosen' if only else 'left'}.{_known(store, todo)}")


def _known(store: Store, todo: Plan) -> str:
    failed = len(store.failed())
    return f" {failed:,} in {store.address} failed; retry them: unbackdoor bench --rerun failed." if failed else ""


def _run_grid(grid: Grid, store: Store, todo: Plan, workers: int, ray: str | None) -> None:
    name, text = kept(grid, Path(store.address) if store.place.near else None)
    store.start()
    store.place.write(f"grids/{name}", text)
    level = quiet()
    crew: Workers = Here()
    if ray is not None:
        crew = Cluster(ray, grid.resources)
    elif workers > 1:
        crew = Processes(workers)
    progress = Progress(len(todo.victims), len(todo.cells), todo.total - len(todo.cells))
    from unbackdoor._bench.schedule import JobSchedule  # imports torch and all methods, which takes seconds

    schedule = JobSchedule(grid, todo, name, store.address, crew, progress)
    try:
        with progress.shown():
            schedule.run()
    finally:
        crew.stop()
        quiet(level)
    where = printable(store.address, SENTENCE)
    print(f"{progress.measured - progress.failed:,} cells measured, {progress.failed:,} failed, in {where}.")
    if progress.failed:
        raise IncompleteError(
            f"{progress.failed:,} of {len(todo.cells):,} cells failed; the first said: {schedule.first} Retry with "
            "`rerun='failed'`."
        )


def _tell(todo: Plan, store: Store, workers: int) -> None:
    """Print the victims and cells that would run, and an estimate of the time."""
    for victim in todo.victims:
        print(f"victim {victim.key}  {printable(victim, SENTENCE)}")
    for cell in todo.cells:
        print(f"cell   {cell.key}  {printable(cell, SENTENCE)}")
    if not todo.total:
        raise UnbackdoorError("The grid has no cell: cells.leave_out takes all away. Leave out less.")
    print(f"{len(todo.victims):,} victims to train and {len(todo.cells):,} of {todo.total:,} cells to measure.")
    if todo.cells:
        print(_estimate(todo, store, workers))


def _estimate(todo: Plan, store: Store, workers: int) -> str:
    """Returns an estimate by the store's medians: of the same task and method, else of the method, else of all."""
    cells: dict[tuple[str, ...], list[float]] = {}
    victims: dict[tuple[str, ...], list[float]] = {}
    for cell in store.read_cells():
        if isinstance(cell, str) or isinstance(cell.content.result, Failed):
            continue
        spec, result = cell.content.spec, cell.content.result
        task, method = spec.victim.task["name"], spec.method.name
        for key in ((task, method), (method,), ()):
            cells.setdefault(key, []).append(result.seconds + (result.scoring_seconds or 0.0))
        if method == "none" and result.training_seconds is not None:
            for key in ((task,), ()):
                victims.setdefault(key, []).append(result.training_seconds)
    if not cells:
        return "How long that takes is not known: the store has no record of its kind yet."

    of_cells = {key: statistics.median(seconds) for key, seconds in cells.items()}
    of_victims = {key: statistics.median(seconds) for key, seconds in victims.items()}

    def typical(medians: dict[tuple[str, ...], float], *keys: tuple[str, ...]) -> float:
        return next(medians[key] for key in (*keys, ()) if key in medians)

    total = sum(typical(of_victims, (victim.name,)) for victim in todo.victims if victims)
    for pending in todo.cells:
        method = pending.spec["method"]["name"]
        total += typical(of_cells, (pending.subject.name, method), (method,))
    together = "" if workers == 1 else f" by {workers} workers"
    without = ", without the victims, of which the store has no record" if todo.victims and not victims else ""
    return f"About {duration(total / workers)}{together}{without}, by the records so far; loading data comes on top."
