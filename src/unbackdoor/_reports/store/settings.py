"""Settings, and the names of their parts in tables."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

from unbackdoor._reports.store import names as names_of
from unbackdoor._reports.store.records import Record

BASELINES = ("none", "fine-tuning")  # stand in every table


class Setting(NamedTuple):
    """Everything that determines a result except the seeds, as canonical JSON; see `Record`."""

    task: str
    attack: str
    rate: float | None
    clean: str
    method: str

    @classmethod
    def of(cls, record: Record) -> "Setting":
        """The setting of a cell."""
        return cls(record.task, record.attack, record.rate, record.clean, record.method)


@dataclass(frozen=True)
class Names:
    """Short names for the values that the records hold as JSON.

    Args:
        tasks, methods: by their JSON.
        attacks, budgets: by the JSON of their task and their own.
        kinds: the registered names of the methods, by their JSON.
    """

    tasks: dict[str, str]
    attacks: dict[tuple[str, str], str]
    budgets: dict[tuple[str, str], str]
    methods: dict[str, str]
    kinds: dict[str, str]

    @classmethod
    def of(cls, records: list[Record]) -> "Names":
        """The names of all that these records hold."""
        labels: dict[str, set[str]] = defaultdict(set)  # a value without a label has an empty one
        attacks_of: dict[str, set[str]] = defaultdict(set)
        budgets_of: dict[str, set[str]] = defaultdict(set)
        for record in records:
            of_grid = json.loads(record.provenance).get("labels")
            for kind, text in (("attack", record.attack), ("method", record.method)):
                labels[text].add(str(of_grid[kind]) if isinstance(of_grid, dict) and kind in of_grid else "")
            attacks_of[record.task].add(record.attack)
            budgets_of[record.task].add(record.clean)
        methods = names_of.of_values({record.method for record in records}, labels)
        return cls(
            tasks=names_of.of_tasks({record.task for record in records}),
            attacks={
                (task, text): name
                for task, texts in attacks_of.items()
                for text, name in names_of.of_values(texts, labels).items()
            },
            budgets={
                (task, text): name
                for task, texts in budgets_of.items()
                for text, name in names_of.of_budgets(texts).items()
            },
            methods=methods,
            kinds={text: json.loads(text)["name"] for text in methods},
        )

    def kind(self, row: Record | Setting) -> str:
        """The registered name of a method."""
        return self.kinds[row.method]

    def baseline(self, setting: Setting) -> str:
        """The registered name of a method that stands in every table; empty for another."""
        return self.kind(setting) if self.kind(setting) in BASELINES else ""

    def labels(self, setting: Setting) -> tuple[str, str, float | None, str, str]:
        """Task, attack, rate, budget and method, as tables name them."""
        task, attack, rate, clean, method = setting
        return self.tasks[task], self.attacks[task, attack], rate, self.budgets[task, clean], self.methods[method]

    def order(self, setting: Setting) -> tuple[Any, ...]:
        """The key that puts settings in the order of the tables."""
        task, attack, rate, budget, method = self.labels(setting)
        controls_first = json.loads(setting.attack)["name"] != "none"
        rates = math.inf if rate is None else -rate
        kind = self.kind(setting)
        place = BASELINES.index(kind) if kind in BASELINES else len(BASELINES)
        return task, controls_first, attack, rates, budget, place, method
