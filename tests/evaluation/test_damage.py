"""Whether a purified model is still of use: the exact test against brute force, and what each command says."""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import nn

import toys
from fixtures import SmallCNN
from unbackdoor import Dataset, attacks, purifiers, purify, stress
from unbackdoor._cli.app import main
from unbackdoor._cli.demos import images as images_demo
from unbackdoor._data.writing import write_parquet
from unbackdoor._errors import IncompleteError
from unbackdoor._models.factory import make
from unbackdoor._purification.run import Run
from unbackdoor._purification.selection import smallest_within
from unbackdoor._reports import build_stress, render_stress
from unbackdoor._tasks.damage import ALLOWED, LEVEL, lost_class, p_value, unusable, without_a_class
from unbackdoor.purifiers import REGISTRY, auto
from unbackdoor.purifiers._trial import Trial


def brute_force(lost: int, gained: int, n: int) -> float:
    """The definition: all outcomes of n paired answers, one by one, at each share of changes in the confidence set."""
    changed = lost + gained
    highest = 1.0 if changed == n else stats.beta.ppf(1 - 0.001, changed + 1, n - changed)
    outcomes = np.array([(one, two, n - one - two) for one, two in product(range(n + 1), repeat=2) if one + two <= n])
    as_bad = outcomes[outcomes[:, 0] - outcomes[:, 1] >= lost - gained]
    tails = []
    for share in np.linspace(0.1, max(highest, 0.1), 41):
        shares = [(share + 0.1) / 2, (share - 0.1) / 2, 1 - share]
        tails.append(stats.multinomial.pmf(as_bad, n, shares).sum())
    return min(1.0, float(max(tails)) + 0.001)


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(7, 1, 12), (4, 0, 12), (12, 0, 12), (9, 3, 30), (0, 0, 12), (6, 6, 12)]
)
def test_the_p_value_is_that_of_all_outcomes_one_by_one(lost: int, gained: int, n: int) -> None:
    assert p_value(lost, gained, n) == pytest.approx(brute_force(lost, gained, n), abs=1e-7)


@pytest.mark.parametrize("n", [15, 30])
def test_a_model_that_lost_no_more_than_is_allowed_is_rarely_called_unusable(n: int) -> None:
    outcomes = [(one, two) for one, two in product(range(n + 1), repeat=2) if one + two <= n]
    called = np.array([(*pair, n - sum(pair)) for pair in outcomes if p_value(*pair, n) <= LEVEL])
    for loss, share in product((0.0, 0.05, 0.1), (0.1, 0.15, 0.25, 0.4, 0.7, 1.0)):
        shares = [(share + loss) / 2, (share - loss) / 2, 1 - share]
        assert stats.multinomial.pmf(called, n, shares).sum() <= LEVEL


def test_more_examples_show_a_smaller_loss() -> None:
    assert p_value(200, 50, 1000) < LEVEL  # 15 points of 1,000
    assert p_value(20, 5, 100) > LEVEL  # 15 points of 100
    assert p_value(120, 50, 1000) > LEVEL  # 7 points
    assert p_value(2500, 1000, 10_000) < LEVEL
    assert p_value(0, 0, 1) > LEVEL


def test_each_method_says_what_may_have_gone_wrong_and_what_to_try() -> None:
    assert [entry.name for entry in REGISTRY if not entry.damage] == []
    for entry in REGISTRY:
        assert not entry.damage.endswith(".")
        for name in ("scale-invariant-fst", "fine-tuning", "ft-init"):
            if f"try {name}" in entry.damage:
                assert name in {other.name for other in REGISTRY}


def hits(right: int, n: int) -> torch.Tensor:
    return torch.arange(n) < right


def test_the_sentence_names_numbers_cause_and_way_out() -> None:
    assert unusable(hits(90, 100), hits(85, 100), "which were held out", purifiers.FST()) is None
    said = unusable(hits(90, 100), hits(40, 100), "which were held out", purifiers.FST())
    assert said is not None
    assert said.startswith(
        "The purified model is not usable: its accuracy on 100 clean examples, which were held out, fell from 90.0% to "
        "40.0%. That is significantly more than 10 points (exact test, p = 0.001); in fst "
    )
    assert "lower `alpha`, or for an image or a text classifier try scale-invariant-fst" in said
    both = unusable(hits(90, 100), hits(40, 100), "x", purifiers.Then(purifiers.CLP(), purifiers.FineTuning()))
    assert both is not None
    assert "in clp " in both
    assert "in fine-tuning " in both


def labelled(labels: torch.Tensor) -> Dataset:
    """Pictures that nobody looks at, with these labels."""
    names = ("inoffensive", "offensive", "other")
    return Dataset(items=torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels=labels.long(), classes=names)


def test_a_model_that_lost_a_class_is_not_usable() -> None:
    """33 of 50 examples are of class 0: one that answers it always loses at most the accuracy on the others."""
    data = labelled(torch.arange(50) >= 33)
    suspect, constant = torch.arange(50) < 39, torch.arange(50) < 33  # the suspect is right on 33 and 6
    said = without_a_class(data, suspect, constant, "which were held out", purifiers.FST())
    assert said is not None
    assert said.startswith(
        "The purified model is not usable: of 50 clean examples, which were held out, it gets 0 of class offensive "
        "right where the suspect gets 6 right, significantly fewer than half; in fst "
    )
    assert unusable(suspect, constant, "x", None) is None  # accuracy alone does not show it


@pytest.mark.parametrize("after", range(13))
def test_a_lost_class_is_a_binomial_test_of_each_class(after: int) -> None:
    """The suspect is right on 12 of class 1, and on all of class 0."""
    data = labelled(torch.arange(60) >= 40)
    suspect, purified = torch.arange(60) < 52, torch.arange(60) < 40 + after
    chance = stats.binomtest(after, 12, 0.5, alternative="less").pvalue
    assert (lost_class(data, suspect, purified) == 1) == (2 * chance <= 0.05)


@pytest.mark.parametrize(
    ("suspect", "after"),
    [(37, 33), (39, 37), (33, 33), (33, 0), (50, 44)],
    ids=["few misses", "some are still right", "the suspect did not know it", "it knew no other", "it lost a few"],
)
def test_a_model_that_lost_no_class(suspect: int, after: int) -> None:
    data = labelled(torch.arange(50) >= 33)
    assert lost_class(data, torch.arange(50) < suspect, torch.arange(50) < after) is None


FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""
MODEL = ("weights.safetensors", "--factory", "net.py:make", "--precision", "fp32")


@pytest.fixture(scope="module")
def user(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model that knows its task, its factory, clean and test pictures."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "net.py").write_text(FACTORY)
    write_parquet(folder / "clean.parquet", digits.select(range(1000, 1200)))
    write_parquet(folder / "test.parquet", digits.select(range(1200, 1400)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = make(f"{folder}/net.py:make")
    raw = Dataset(items=digits.items[:1000], labels=digits.labels[:1000])
    tuning = purifiers.FineTuning(epochs=15, learning_rate=0.1, batch_size=32)
    save_file(purify(fresh, raw, tuning, precision="fp32").model.state_dict(), folder / "weights.safetensors")
    return folder


class Ended(NamedTuple):
    """The traces of a command: its exit code, and what it printed."""

    code: object
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ended]]:
    """Runs a command in this process, in a folder."""
    logger = logging.getLogger("unbackdoor")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate

    def ended(folder: Path, *arguments: object) -> Ended:
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        return Ended(stopped.value.code, *capsys.readouterr())

    yield ended
    logger.handlers, logger.level, logger.propagate = handlers, level, propagate


@pytest.mark.parametrize(
    ("method", "scored"), [("fe-tuning", ("--data", "test.parquet")), ("linear-probing+fe-tuning", ())]
)
def test_a_wreck_is_reported_first_everywhere_and_the_exit_code_is_1(
    method: str, scored: tuple[str, ...], user: Path, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    out = tmp_path / "out"
    rate = "--fe-tuning.learning-rate" if "+" in method else "--learning-rate"
    done = run(user, "purify", method, *MODEL, "--clean", "clean.parquet", rate, "1e-9", "--out", out, *scored)
    assert done.code == 1, done.err
    first = done.out.splitlines()[0]
    assert first.startswith("The purified model is not usable: its accuracy on ")
    assert "in fe-tuning all features had to move to a head drawn at random: try ft-init or fine-tuning" in first
    if "+" in method:  # parameters are options here, in the record and its pages as well
        assert "in linear-probing the learning rate was probably too high for the features" in first
        assert "lower --learning-rate" in first
    assert done.err.splitlines()[-1] == f"{out} is written, but its model is not usable; see the first line above."
    assert first not in done.err  # once is enough
    record = json.loads((out / "record.json").read_text())
    assert (record["usable"], record["warnings"][0]) == (False, first)
    assert load_file(out / "model.safetensors").keys() == load_file(user / "weights.safetensors").keys()
    text = (out / "README.md").read_text().split("---\n")[2].strip().splitlines()
    assert text[0] == f"**{first}**"
    assert "\n".join(text).count("not usable") == 1
    if scored:
        body = (out / "report.html").read_text().split("<main>")[1]
        assert body.index("not usable") < body.index("<h1>")
        assert body.count("not usable") == 1


def test_a_suspect_that_auto_hands_back_is_no_purified_model(
    user: Path, tmp_path: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline sees it in the exit code, in the first line, and in `usable`, the card and the page."""
    monkeypatch.setattr(auto, "methods_to_try", lambda *_: [purifiers.FETuning(epochs=1, learning_rate=1e-9)])
    data = ("--clean", "clean.parquet", "--data", "test.parquet", "--detectors", "margin")
    out = tmp_path / "out"
    done = run(user, "purify", "auto", *MODEL, *data, "--out", out)
    assert done.code == 1, done.err
    first = done.out.splitlines()[0]
    assert first.startswith("Nothing was purified: no method lost at most 10 points of accuracy on 40 held-out ")
    assert "or raise --max-loss: fe-tuning (epochs=1, learning_rate=1e-09) lost least, " in first
    assert done.err.splitlines()[-1] == f"{out} is written, but it is the suspect as it was; see the first line above."
    assert (done.out + done.err).count("Nothing was purified") == 1
    record = json.loads((out / "record.json").read_text())
    assert (record["usable"], record["warnings"][0], record["choice"]["kept"]) == (False, first, None)
    before, after = load_file(user / "weights.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    text = (out / "README.md").read_text().split("---\n")[2].strip().splitlines()
    assert text[0].startswith("**Nothing was purified: ")
    assert "\n".join(text).count("Nothing was purified") == 1
    body = (out / "report.html").read_text().split("<main>")[1]
    assert body.index("Nothing was purified") < body.index("<h1>Handed back by auto")


def test_a_result_of_auto_that_keeps_a_shortcut_is_no_purified_model(
    user: Path, tmp_path: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written, as the best that there is; a pipeline that looks at the exit code alone does not ship it."""
    monkeypatch.setattr(Trial, "most_left", 0.74)
    monkeypatch.setattr(auto, "methods_to_try", lambda *_: [purifiers.FineTuning(epochs=1)])
    data = ("--clean", "clean.parquet", "--data", "test.parquet", "--detectors", "margin")
    out = tmp_path / "out"
    done = run(user, "purify", "auto", *MODEL, *data, "--out", out)
    assert done.code == 1, done.err
    first = done.out.splitlines()[0]
    assert first == (
        "The result did not pass its tests: no method that lost at most 10 points of accuracy removed the shortcuts; "
        "fine-tuning (epochs=1) left the least of them: one still moves 74% more examples than a random trigger does. "
        "Do not take it for purified. Give more clean examples, raise --max-loss, or try another method."
    )
    assert (done.out + done.err).count("did not pass its tests") == 2
    end = f"{out} is written, but its model did not pass its tests; see the first line above."
    assert done.err.splitlines()[-1] == end
    record = json.loads((out / "record.json").read_text())
    assert (record["usable"], record["warnings"][0], record["choice"]["passed"]) == (False, first, False)
    text = (out / "README.md").read_text().split("---\n")[2].strip().splitlines()
    assert text[0].startswith("**The result did not pass its tests: ")
    body = (out / "report.html").read_text().split("<main>")[1]
    assert body.index("The result did not pass its tests") < body.index("<h1>Not purified by auto")


def test_a_model_that_kept_its_use_ends_with_0(user: Path, tmp_path: Path, run: Callable[..., Ended]) -> None:
    done = run(user, "purify", "fine-tuning", *MODEL, "--clean", "clean.parquet", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "not usable" not in done.out + done.err + (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/record.json").read_text())["usable"] is True


CONVOLUTIONS = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
"""


def test_a_method_without_clean_examples_is_judged_by_the_test_examples(
    digits: Dataset, user: Path, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    """CLP that prunes all channels but the flattest."""
    (tmp_path / "net.py").write_text(CONVOLUTIONS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = make(f"{tmp_path}/net.py:make")
    raw = Dataset(items=digits.items[:1000], labels=digits.labels[:1000])
    tuning = purifiers.FineTuning(epochs=5, learning_rate=0.05, batch_size=32)
    save_file(purify(fresh, raw, tuning, precision="fp32").model.state_dict(), tmp_path / "weights.safetensors")
    command = ("purify", "clp", *MODEL, "--u", 0, "--out")
    done = run(tmp_path, *command, "known", "--data", user / "test.parquet")
    assert done.code == 1, done.err
    assert "on 200 clean examples, which are scored, fell from" in done.out.splitlines()[0]
    assert json.loads((tmp_path / "known/record.json").read_text())["usable"] is False
    done = run(tmp_path, *command, "unknown")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "unknown/record.json").read_text())["usable"] is None


@pytest.mark.thorough
def test_a_demo_of_a_wreck_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        images_demo, "METHODS", (purifiers.FineTuning(epochs=1), purifiers.FETuning(epochs=1, learning_rate=1e-9))
    )
    with pytest.raises(IncompleteError, match="is not usable") as ended:
        images_demo.image(out=str(tmp_path / "demo"), overwrite=False, seed=0, epochs=3)
    assert ended.value.exit_code == 1
    assert "The purified model is not usable: " in capsys.readouterr().out
    assert (tmp_path / "demo/report.html").read_text().count("is not usable") == 1
    assert (tmp_path / "demo/purified/model.safetensors").is_file()


def test_a_wreck_under_stress_is_reported_first(suspect: nn.Module, digits: Dataset) -> None:
    wreck = copy.deepcopy(suspect)
    nn.init.zeros_(wreck.classifier.weight)
    found = stress(
        wreck,
        victim=suspect,
        clean=digits.select(range(1000, 1200)),
        test=digits.select(range(1200, 1400)),
        attack=attacks.BadNets(size=2, margin=0, target=3),
        parts=("path",),
        precision="fp32",
    )
    content = found.to_json()
    assert content["usable"] is False
    assert content["warnings"][0].startswith("The purified model is not usable: its accuracy on ")
    assert content["warnings"][0].endswith("purify the suspect again by another method.")
    body = render_stress(build_stress(found, {"model": "a", "victim": "b", "control": None}, None)).split("<main>")[1]
    assert body.index("not usable") < body.index("<h1>")


@pytest.fixture(scope="module")
def suspect(digits: Dataset) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = SmallCNN().eval()
    tuning = purifiers.FineTuning(epochs=3, learning_rate=0.05)
    return purify(fresh, digits.select(range(1000)), tuning, precision="fp32").model


def test_python_raises_nothing_and_says_it_first(
    suspect: nn.Module, digits: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    def forgets(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        run.warn("something else")
        nn.init.zeros_(run.head(model).weight)
        return model

    with caplog.at_level(logging.WARNING, "unbackdoor"):
        purified = purify(suspect, digits.select(range(1000, 1200)), forgets)
    assert purified.record["usable"] is False
    assert purified.record["warnings"][0].startswith("The purified model is not usable: its accuracy on ")
    assert "on 200 clean examples, the ones it was tuned on, fell from 9" in purified.record["warnings"][0]
    assert "check forgets on clean examples" in purified.record["warnings"][0]
    assert purified.record["warnings"][1] == "something else"
    assert purified.record["warnings"][0] in caplog.text


def test_a_method_that_costs_little_is_usable(suspect: nn.Module, digits: Dataset) -> None:
    record = purify(suspect, digits.select(range(1000, 1200)), purifiers.FineTuning(epochs=1)).record
    assert record["usable"] is True
    assert record["warnings"] == []


def test_without_clean_examples_nothing_is_known(suspect: nn.Module) -> None:
    record = purify(suspect, None, purifiers.CLP()).record
    assert record["usable"] is None


def test_examples_that_were_held_out_decide(suspect: nn.Module, digits: Dataset) -> None:
    """The method remembers what it was tuned on, and forgets all else: 40 of 500 examples, which is 8 points."""
    clean = digits.select(range(1000, 1500))

    def overfits(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        _, held = run.hold_out(clean, share=0.08)
        wrong = {item.numpy().tobytes() for item in held.items}

        class Remembering(type(model)):  # type: ignore[misc]
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                scores = super().forward(x)
                known = {row.numpy().tobytes() for row in clean.encode(held.items)}
                return torch.stack(
                    [
                        -score if picture.numpy().tobytes() in known else score
                        for picture, score in zip(x, scores, strict=True)
                    ]
                )

        assert len(wrong) == len(held)
        model.__class__ = Remembering
        return model

    record = purify(suspect, clean, overfits, precision="fp32").record
    assert record["clean"]["held_out"] == 40
    assert record["purified_accuracy_on_clean"]["value"] > record["suspect_accuracy_on_clean"]["value"] - ALLOWED
    assert record["usable"] is False
    assert "on 40 clean examples, which were held out, fell from" in record["warnings"][0]

    def sees_them_after_all(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        model = overfits(model, clean, run)
        run.tune(model, clean, epochs=1, learning_rate=1e-9)
        return model

    record = purify(suspect, clean, sees_them_after_all, precision="fp32").record
    assert record["usable"] is True

    # What one step held out, the next one may see.
    record = purify(suspect, clean, purifiers.Then(overfits, lambda model, clean, run: model), precision="fp32").record
    assert record["usable"] is True


def test_examples_that_were_left_out_in_their_turn_decide(suspect: nn.Module, digits: Dataset) -> None:
    clean = digits.select(range(1000, 1200))

    def cross_validates(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        run.cross_validated = torch.zeros(
            len(clean), dtype=torch.bool
        )  # on examples that it had not seen, it knew none
        return model

    record = purify(suspect, clean, cross_validates, precision="fp32").record
    assert record["purified_accuracy_on_clean"] == record["suspect_accuracy_on_clean"]
    assert record["usable"] is False
    assert "on 200 clean examples, which were left out in their turn, fell from" in record["warnings"][0]


def test_a_model_that_lost_a_class_is_not_chosen(digits: Dataset) -> None:
    """By accuracy, with a margin of 90 points, each would do."""
    clean = digits.select(range(1000, 1200))
    run = toys.a_run()

    pictures = clean.encode(clean.items).flatten(1)

    class Answering(nn.Module):
        """Right on the classes below a number; others get class 0."""

        def __init__(self, known: int) -> None:
            super().__init__()
            self.known = known

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            labels = clean.labels[torch.cdist(x.flatten(1).float(), pictures).argmin(1)]
            return nn.functional.one_hot(torch.where(labels < self.known, labels, 0), 10).to(x)

    def tuned(rho: float, part: Dataset, said: str) -> nn.Module:
        return Answering(9 if rho < 0.3 else 10)

    chosen = smallest_within(Answering(10), clean, run, margin=0.95, folds=2, field="rho", tuned=tuned)
    assert chosen == pytest.approx(0.3)
    assert not any("rho 0.2" in warning for warning in run.warnings)  # as one that may lose no more


def test_each_class_counts_alike_where_a_value_is_chosen(digits: Dataset) -> None:
    """Of 60 zeros and 20 ones, a model that knows 6 ones less loses 7.5 points of accuracy; by classes it is 15."""
    zeros, ones = (torch.nonzero(digits.labels == label).flatten()[:n] for label, n in ((0, 60), (1, 20)))
    clean = digits.select(torch.cat([zeros, ones]))
    pictures = clean.encode(clean.items).flatten(1)
    run = toys.a_run()

    class Forgetting(nn.Module):
        """Right but for some of the ones."""

        def __init__(self, forgotten: int) -> None:
            super().__init__()
            self.forgotten = forgotten

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.cdist(x.flatten(1).float(), pictures).argmin(1)
            answers = torch.where((rows >= 60) & (rows < 60 + self.forgotten), 0, clean.labels[rows])
            return nn.functional.one_hot(answers, 10).to(x)

    def tuned(rho: float, part: Dataset, said: str) -> nn.Module:
        return Forgetting(6 if rho < 0.7 else 3)

    chosen = smallest_within(Forgetting(0), clean, run, margin=0.1, folds=2, field="rho", tuned=tuned)
    assert chosen == pytest.approx(0.7)
    assert any(
        note.startswith("rho 0.6 loses 15.0 points of accuracy, each class counting alike") for note in run.notes
    )
    assert any(note.startswith("rho 0.7 loses 7.5 points of accuracy, each class counting alike") for note in run.notes)


def test_too_few_examples_are_said_to_be_too_few(suspect: nn.Module, digits: Dataset) -> None:
    def changes(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        with torch.no_grad():
            run.head(model).bias[int(clean.labels[0])] -= 1000.0  # a class of its own is lost
        return model

    clean = digits.select(range(1000, 1015))
    record = purify(suspect, clean, changes, precision="fp32").record
    lost = record["suspect_accuracy_on_clean"]["value"] - record["purified_accuracy_on_clean"]["value"]
    assert 0.1 < lost < 0.4
    assert record["usable"] is True
    assert record["warnings"][-1].endswith(
        "they are too few to decide whether more than 10 points are lost. Score it on others (`test`), or give more."
    )
