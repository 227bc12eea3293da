"""A method that `Auto` tried, and its result on held-out examples."""

import copy
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.judging import ExactShare, HeldOut
from unbackdoor._detection.result import Audit
from unbackdoor._errors import UnbackdoorError, out_of_memory
from unbackdoor._purification.method import Method, applied, method_name
from unbackdoor._purification.run import Run
from unbackdoor._purification.selection import difference
from unbackdoor._registry.entries import to_json
from unbackdoor._registry.purifiers import REGISTRY
from unbackdoor.purifiers._shortcuts import Shortcut, counting, described

GONE = 0.1  # of the held-out examples: what a shortcut may move more than a random trigger of its size does
NO_MEMORY = "it ran out of memory"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A method that was tried, and its result.

    Args:
        method: on its own copy of the suspect.
        model: the result; None if the method refused.
        problem: why it refused.
        lost: share of the held-out examples, by accuracy.
        lost_a_class: of those that the suspect knew; see `Task.lost_a_class`.
        left: for each shortcut with a trigger, how many held-out examples it and a random trigger move.
        seconds: of the method.
        warnings: of the method.
        audit: of the result, see `audited`; None as long as there is none.
        known: the classes that the shortcuts of the suspect lead to.
    """

    method: Method
    model: nn.Module | None
    problem: str = ""
    warnings: tuple[str, ...] = ()
    lost: float = 1.0
    lost_a_class: bool = False
    left: tuple[tuple[Shortcut, ExactShare, ExactShare], ...] = ()
    seconds: float = 0.0
    audit: Audit | str | None = None
    known: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, method: Method, suspect: nn.Module, tuned: Dataset, held: Dataset, shortcuts: list[Shortcut], run: Run
    ) -> "Trial":
        """Run a method on a copy, and judge the result on held-out examples.

        Args:
            method: to try.
            suspect: unchanged.
            tuned: the examples for the method.
            held: others.
            shortcuts: of the suspect.
            run: of the purification.
        """
        start, warned = time.perf_counter(), len(run.warnings)
        try:
            with run.of_another(method_name(method)):
                model = applied(method, copy.deepcopy(suspect), tuned, run)
        except UnbackdoorError as problem:
            return cls(method=method, model=None, problem=str(problem), seconds=time.perf_counter() - start)
        except (MemoryError, RuntimeError) as problem:  # the audit and the other trials may be the work of hours
            if not out_of_memory(problem):
                raise
            return cls(method=method, model=None, problem=NO_MEMORY, seconds=time.perf_counter() - start)
        seconds = time.perf_counter() - start
        warnings = tuple(run.warnings[warned:])
        del run.warnings[warned:]  # they are the result's, if it is kept
        before, after = (run.task.outcomes(each, held, run.arithmetic) for each in (suspect, model))
        held_out = HeldOut.of(model, held, run.arithmetic)
        moving = [(shortcut, shortcut.moving(held_out)) for shortcut in shortcuts]
        return cls(
            method=method,
            model=model,
            lost=difference(before, after).lost,
            lost_a_class=run.task.lost_a_class(held, before, after),
            left=tuple((shortcut, *shares) for shortcut, shares in moving if shares is not None),
            seconds=seconds,
            warnings=warnings,
        )

    @property
    def returned(self) -> list[Shortcut]:
        """The shortcuts in the audit of the result that lead to a class of the suspect's shortcuts.

        Clean models also have shortcuts, and some raise an alarm. So one to another class does not show that a method
        left the backdoor.
        """
        shortcuts = counting(self.audit) if self.audit is not None else []
        return [each for each in shortcuts if each.target in self.known]

    @property
    def most_left(self) -> float:
        """The largest share that a shortcut moves more than a random trigger does; 0 if there is none."""
        again = [each.beyond_chance for each in self.returned]
        return max([0.0, *(moved.value - random.value for _, moved, random in self.left), *again])

    @property
    def tested(self) -> bool:
        """Whether the suspect had a shortcut that could show if the result still has it."""
        return bool(self.left or (self.known and isinstance(self.audit, Audit)))

    def within(self, allowed: float, count: int) -> bool:
        """Returns whether it lost no class, and loses at most a share of accuracy, in whole examples of `count`."""
        return self.model is not None and not self.lost_a_class and round(self.lost * count) <= allowed * count + 1e-9

    def sentence(self, count: int) -> str:
        """Returns its numbers in words; `count` held-out examples are their base."""
        if self.model is None:
            return f"refused ({self.problem})"
        if not self.left and not self.returned:
            left = ""
        elif self.returned:
            left = f", and its audit found a shortcut again: {self.returned[0].sentence}"
        else:
            left = f", and a shortcut moves {self.most_left:.0%} more than a random trigger does"
        alone = ", has lost a class" if self.lost_a_class else ""
        return f"loses {100 * self.lost:.1f} points of accuracy on {count} held-out examples{alone}{left}"

    def to_json(self) -> dict[str, Any]:
        """Returns the entries of the record."""
        left = [
            {"detector": shortcut.detector, "moved": moved.to_json(), "random": random.to_json()}
            for shortcut, moved, random in self.left
        ]
        return {
            "method": {**to_json(self.method, REGISTRY), "repr": repr(self.method)},
            "refused": self.problem or None,
            "lost": None if self.model is None else self.lost,
            "shortcuts_left": left,
            "audit": None if self.audit is None else described(self.audit, counting(self.audit)),
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }
