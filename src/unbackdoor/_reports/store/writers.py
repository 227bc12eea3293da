"""The numbers as CSV, JSON, LaTeX and Markdown. Text that came with a store is escaped for each of them."""

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path

from unbackdoor._artifacts.store_report import StoreReport
from unbackdoor._reports.store.further import further_tables
from unbackdoor._reports.store.numbers import Block, Report, Row, Spread, column_of, flat_names


def as_json(report: Report) -> str:
    """All numbers.

    Raises:
        ValidationError: they are not those of a report.
    """
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n"
    StoreReport.model_validate_json(text, strict=True)
    return text


def as_csv(report: Report) -> str:
    """Returns one line per setting; shares in [0, 1], memory in bytes."""
    file = io.StringIO()
    lines = [
        {name: " ".join(map(str, entry)) if isinstance(entry, tuple) else _cell(entry) for name, entry in line.items()}
        for line in (row.flat() for row in report.rows)
    ]
    writer = csv.DictWriter(file, flat_names(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def as_latex(report: Report) -> str:
    """One table for each task and clean budget; it needs the package booktabs."""
    parts = [f"% {_one_line(sentence)}" for sentence in (_legend(report), *_left_out(report), *report.notes)]
    for block in report.blocks:
        parts.append(_latex_table(f"{_title(block)}. {_meaning(report, block)}", _matrix(report, block)))
    for table in further_tables(report):
        parts.append(_latex_table(f"{table.title}. {table.meaning}", [table.head, *table.rows]))
    return "\n\n".join(parts) + "\n"


def _latex_table(caption: str, matrix: list[list[str]]) -> str:
    head, *body = [" & ".join(map(_latex, line)) + " \\\\" for line in matrix]
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex(caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(matrix[0]) - 1)}}}",
        "\\toprule",
        head,
        "\\midrule",
        *body,
    ]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"])


def as_markdown(report: Report, out: str) -> str:
    """A results page: how it was measured, then the tables. It holds no local path.

    Args:
        report: its numbers.
        out: the page, as a command can name it.
    """
    sections = (
        [f"# {_markdown(Path(out).stem)}", ""],
        _measured_how(report, out),
        _main_tables(report),
        _second_tests(report),
        _control_flips(report),
        _further_tables(report),
        _costs(report),
        _averages_without(report),
        _stress_tests(report),
        _failures(report),
    )
    return "\n".join(line for section in sections for line in section) + "\n"


def _measured_how(report: Report, out: str) -> list[str]:
    """Commands, machine, versions, seeds and numbers of examples."""
    grids = _grids(report)
    lines = ["## How it was measured", "", "- **Commands**:", ""]
    commands = [*_commands(report, grids), f"unbackdoor report {report.store} -o {_one_line(out)}"]
    # Four spaces and a fence: within a list, the repository's Markdown and the docs site's agree on no other block.
    lines += ["    ```sh", *(f"    {command}" for command in commands), "    ```"]
    lines += ["", f"- **Commit**: {_counted(report.commits)}."]
    lines += [f"- **Machine**: {_counted(report.machines) or 'not known'}."]
    lines += [f"- **Versions**: {_counted(report.versions) or 'not known'}."]
    if report.dates:
        lines.append(f"- **Measured**: {_markdown(' to '.join(dict.fromkeys(day[:10] for day in report.dates)))}.")
    seeds = sorted({seed for row in report.rows for seed in row.seeds})
    victims = sorted({seed for row in report.rows for seed in row.victim_seeds})
    of_victims = f"of the victims {_listed(victims)}" if victims else "the victims were given"
    lines.append(f"- **Seeds**: of the purification {_listed(seeds)}; {of_victims}.")
    lines += [f"- **n**: {_markdown(sentence)}" for sentence in _examples(report)]
    for task, spread in report.victim_seconds.items():
        lines.append(f"- **Training a victim** of {_markdown(task)}: {_seconds(spread)} seconds (n = {spread.n}).")
    lines += [f"- {_markdown(sentence)}" for sentence in (_legend(report), *report.notes)]
    return lines


def _main_tables(report: Report) -> list[str]:
    """One table for each task and clean budget."""
    lines: list[str] = []
    for block in report.blocks:
        lines += ["", f"## {_markdown(_title(block))}", "", f"{_markdown(_meaning(report, block))}", ""]
        head, *body = _matrix(report, block)
        lines += _table(head, body)
    return lines


def _second_tests(report: Report) -> list[str]:
    """Scores on the second test examples of a task."""
    lines: list[str] = []
    for block in report.blocks:
        rows = [report.rows[place] for places in block.cells for place in places if place is not None]
        if any((row.second_accuracy or row.second_loss) and row.baseline != "none" for row in rows):
            lines += ["", f"## {_markdown(_title(block))}: second test examples", ""]
            clean = "Clean loss in nats" if any(row.second_loss for row in rows) else _accuracy(rows)
            lines += [f"{clean} / attack success in %, of the first purification seed.", ""]
            lines += _table(
                ["method", *block.columns],
                [
                    [method, *(_second(report, place) for place in places)]
                    for method, places in zip(block.methods, block.cells, strict=True)
                ],
            )
    return lines


def _control_flips(report: Report) -> list[str]:
    """Flip rates of the clean control after the same method."""
    lines: list[str] = []
    flips = [row for row in report.rows if row.flip_rate is not None]
    if flips:
        lines += ["", "## The clean control, put through the same method", ""]
        lines += ["Flip rate: how often it sends the same triggered examples where the attacker wants, in %.", ""]
        clean = "its clean accuracy" if not any(row.control_loss for row in flips) else "its clean accuracy or loss"
        lines += _table(
            ["task", "budget", "attack", "method", "attack success", "flip rate", clean, "n"],
            [
                [
                    row.task,
                    row.budget,
                    row.column,
                    row.method,
                    _mean_and_sd(row.attack_success),
                    _mean_and_sd(row.flip_rate),
                    _clean(row.control_accuracy, row.control_loss),
                    str(row.flip_rate.n) if row.flip_rate else "",
                ]
                for row in flips
            ],
        )
    return lines


def _further_tables(report: Report) -> list[str]:
    """What trainers distrust, and guards in front of the victims."""
    lines: list[str] = []
    for table in further_tables(report):
        lines += ["", f"## {table.title}", "", _markdown(table.meaning), "", *_table(table.head, table.rows)]
    return lines


def _costs(report: Report) -> list[str]:
    """Seconds and memory."""
    lines: list[str] = []
    timed = [row for row in report.rows if row.seconds is not None and row.baseline != "none"]
    if timed:
        lines += ["", "## Cost", "", "Seconds of the purification, mean and (standard deviation).", ""]
        lines += _table(
            ["task", "budget", "attack", "method", "seconds", "peak memory, MiB", "n"],
            [
                [
                    row.task,
                    row.budget,
                    row.column,
                    row.method,
                    _seconds(row.seconds),
                    "" if row.memory is None else f"{row.memory.most / 2**20:,.0f}",
                    str(row.counted),
                ]
                for row in timed
            ],
        )
    return lines


def _averages_without(report: Report) -> list[str]:
    """The victims whose cells are in no average."""
    lines: list[str] = []
    if report.left_out:
        lines += ["", "## Left out of all averages", ""]
        lines += [f"- {_markdown(sentence)}" for sentence in _left_out(report)]
    return lines


def _stress_tests(report: Report) -> list[str]:
    """Attack success after tuning with a few triggered examples."""
    lines: list[str] = []
    if report.stress:
        counts = sorted({each.k for row in report.stress for each in row.retuned})
        lines += ["", "## Stress", "", "Attack success in % before, and after tuning with k triggered examples.", ""]
        lines += _table(
            ["stress test", "model", "before", *(f"k = {k}" for k in counts), "reactivated"],
            [
                [
                    row.source,
                    row.model.replace("_", " "),
                    _percent(row.attack_success),
                    *(next((_mean(each.mean, each.sd) for each in row.retuned if each.k == k), "–") for k in counts),
                    _percent(row.reactivated),
                ]
                for row in report.stress
            ],
        )
    return lines


def _failures(report: Report) -> list[str]:
    """Returns the number of failures with each message."""
    lines: list[str] = []
    guards = [(row.guard, _pathless(text)) for row in report.guards for text in row.messages]
    if report.failures or guards:
        lines += ["", "## Failures", ""]
        summary = Counter((report.rows[each.row].method, _pathless(each.message)) for each in report.failures)
        lines += [f"- {count:,} of {_markdown(method)}: {_markdown(text)}" for (method, text), count in summary.items()]
        lines += [f"- {_markdown(guard)}: {_markdown(text)}" for guard, text in dict.fromkeys(guards)]
    return lines


def _grids(report: Report) -> list[str]:
    return sorted({line.grid.rpartition("/")[2] for line in report.cells})


def _commands(report: Report, grids: list[str]) -> list[str]:
    return [
        f"unbackdoor bench {_one_line(f'{report.store}/grids/{grid}')} --out {_one_line(report.store)}"
        for grid in grids
    ]


def _title(block: Block) -> str:
    budget = "no clean examples" if block.budget == "none" else f"clean budget: {block.budget} examples"
    return f"{block.task}, {budget}{', all-to-all attacks' if block.apart else ''}"


def _on_several_attacks(block: Block) -> bool:
    """Whether some method was run on more than one attack."""
    return any(over is not None and over.n > 1 for over in block.over)


def _matrix(report: Report, block: Block) -> list[list[str]]:
    """Methods by attacks; of several attacks, the worst and the mean come first."""
    lines = [["method", *(["worst, mean"] * _on_several_attacks(block)), *block.columns]]
    for method, places, over in zip(block.methods, block.cells, block.over, strict=True):
        summary = "–" if over is None else f"{_percent(over.most)}, {_percent(over.mean)} of {over.n}"
        lines.append([method, *([summary] * _on_several_attacks(block)), *(_entry(report, place) for place in places)])
    return lines


def _meaning(report: Report, block: Block) -> str:
    rows = [report.rows[place] for places in block.cells for place in places if place is not None]
    counts = sorted({row.clean_n for row in rows if row.clean_n})
    triggered = sorted({row.triggered_n for row in rows if row.triggered_n})
    measures = f"{_accuracy(rows)} / attack success in %"
    if any(row.clean_loss for row in rows):
        measures = (
            "Clean loss in nats per answer token / attack success / false activation / empty answers, the last three "
            "in %"
        )
    text = f"{measures}, mean and (standard deviation over seeds), with the number n of runs"
    over = " Before them the attack success over the attacks that the method was run on." * _on_several_attacks(block)
    return f"{text}; {_listed(counts)} clean and {_listed(triggered)} triggered test examples.{over}"


def _accuracy(rows: list[Row]) -> str:
    return "Zero-shot accuracy" if any(row.zero_shot for row in rows) else "Clean accuracy"


def _legend(report: Report) -> str:
    unknown = (
        " A question mark: it is not known whether the attack was implanted."
        if any(row.unknown for row in report.rows)
        else ""
    )
    damaged = [row for row in report.rows if row.unusable]
    costs = ["10 points of clean accuracy"] * any(row.clean_loss is None for row in damaged)
    costs += ["0.5 nats of clean loss per answer token"] * any(row.clean_loss is not None for row in damaged)
    unusable = (
        f" A section sign (§): the method cost the model its use, significantly more than {' or '.join(costs)}."
        if costs
        else ""
    )
    return (
        "Only runs that differ in nothing but their seeds are averaged. Attacks that were not implanted are left out "
        f"and marked with a dagger (†).{unknown}{unusable}"
    )


def _examples(report: Report) -> list[str]:
    """Numbers of cells and of scored examples; tasks of which these are the same share a line."""
    lines: dict[str, list[str]] = {}
    for task in dict.fromkeys(row.task for row in report.rows):
        mine = [row for row in report.rows if row.task == task]
        clean = sorted({row.clean_n for row in mine if row.clean_n})
        triggered = sorted({row.triggered_n for row in mine if row.triggered_n})
        finished = sum(row.counted + row.not_implanted for row in mine)
        line = (
            f"{finished:,} finished {'cell' if finished == 1 else 'cells'}, {sum(row.failed for row in mine):,} "
            f"failed; scored on {_listed(clean)} clean and {_listed(triggered)} triggered test examples."
        )
        lines.setdefault(line, []).append(task)
    return [f"{', '.join(tasks)}: {'each ' if len(tasks) > 1 else ''}{line}" for line, tasks in lines.items()]


def _left_out(report: Report) -> list[str]:
    lines = []
    for victim in report.left_out:
        seed = "" if victim.seed is None else f", victim seed {victim.seed}"
        success = (
            "" if victim.success is None else f"attack success was {100 * victim.success:.1f} % before any method; "
        )
        lines.append(
            f"{victim.task}, {column_of(victim.attack, victim.rate, False)}{seed}: the attack was not implanted "
            f"({success}{victim.cells:,} {'cell' if victim.cells == 1 else 'cells'})."
        )
    return lines


def _entry(report: Report, place: int | None) -> str:
    if place is None:
        return "not run"
    row = report.rows[place]
    return entry(row)


def _second(report: Report, place: int | None) -> str:
    if place is None:
        return "not run"
    row = report.rows[place]
    if row.counted == 0:
        return entry(row)
    if row.second_accuracy is None and row.second_loss is None:
        return "not run"
    clean = _clean(row.second_accuracy, row.second_loss)
    return clean + ("" if row.control else f" / {_mean_and_sd(row.second_success)}")


def entry(row: Row) -> str:
    """Returns a row as a table's cell: clean accuracy or loss / attack success, n, and its defects."""
    if row.counted == 0:
        return f"† not implanted ({row.not_implanted})" if row.not_implanted else f"failed ({row.failed})"
    text = _clean(row.clean_accuracy, row.clean_loss)
    if not row.control or row.attack_success is not None:
        text += f" / {_mean_and_sd(row.attack_success)}"
        if row.empty is not None:
            text += f" / {_mean_and_sd(row.false_activation)} / {_mean_and_sd(row.empty)}"
    text += f", n = {row.counted}"
    marks = [f"† {row.not_implanted} left out"] if row.not_implanted else []
    marks += [f"{row.failed} failed"] if row.failed else []
    marks += [f"§ {row.unusable} not usable"] if row.unusable else []
    return text + ("?" if row.unknown else "") + (f" ({', '.join(marks)})" if marks else "")


def _mean_and_sd(spread: Spread | None) -> str:
    return "–" if spread is None else _mean(spread.mean, spread.sd)


def _clean(accuracy: Spread | None, loss: Spread | None) -> str:
    """A clean accuracy in %, or the clean loss of a language model in nats."""
    if loss is None:
        return _mean_and_sd(accuracy)
    return f"{loss.mean:.3f}" + ("" if loss.sd is None else f" ({loss.sd:.3f})")


def _mean(mean: float, sd: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ({100 * sd:.1f})")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _seconds(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.1f}" + ("" if spread.sd is None else f" ({spread.sd:.1f})")


def _listed(numbers: list[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers) or "no"


def _counted(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return _markdown(_pathless(next(iter(counts))))
    return "; ".join(f"{_markdown(_pathless(name))} ({count:,} cells)" for name, count in counts.items())


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(text if line is lines[1] else _markdown(text) for text in line) + " |" for line in lines]


def _cell(entry: object) -> object:
    """A spreadsheet runs text that begins like a formula."""
    if isinstance(entry, str) and (entry.lstrip()[:1] in ("=", "+", "-", "@") or entry[:1] in ("\t", "\r")):
        return f"'{entry}"
    return entry


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _markdown(text: str) -> str:
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)


def _latex(text: str) -> str:
    special = {
        "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "†": "$^\\dagger$",
        "§": "\\S{}", "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "–": "--",
        '"': "\\textquotedbl{}", **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    }  # fmt: skip
    return "".join(special.get(letter, letter) for letter in _one_line(text))


def _pathless(text: str) -> str:
    """Returns a message without the folders of the machine."""
    return re.sub(r"(?<![\w/:.])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+", "…/", text)
