"""Statistics of adapters against full decompositions and adapters made by hand, and the hint of the audit."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from scipy.stats import kurtosis

import chats
import toys
from commands import run
from unbackdoor import Dataset, UnbackdoorError, audit, detectors
from unbackdoor._artifacts.adapter_bank import AdapterBank
from unbackdoor._detection import adapter_bank
from unbackdoor._guarding.area import Area
from unbackdoor._training.lora import factors
from unbackdoor.detectors._change_statistics import kind_of, statistics_of
from unbackdoor.detectors.adapter_statistics import difference_from, hint, shapes_by_kind, statistics_by_kind
from unbackdoor.testing import check_detector

# peft asks transformers in a way that it will not answer for ever; the library itself hides that from users.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FAST: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def an_adapter(model: torch.nn.Module, seed: int = 0, **settings: Any) -> Any:
    """A LoRA adapter on a model, by peft, whose matrices are random."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"], **settings})
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for place, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.01 * drawn(*parameter.shape, seed=100 * seed + place)
    return adapted.eval()


@pytest.mark.parametrize("shape", [(12, 8, 3), (7, 30, 8), (600, 20, 2), (4, 5, 8)], ids=str)
def test_they_are_those_of_the_whole_matrix(shape: tuple[int, int, int]) -> None:
    outputs, inputs, rank = shape
    columns, rows = drawn(outputs, rank), drawn(rank, inputs, seed=1) + 0.3
    change = columns.double() @ rows.double()
    values = torch.linalg.svdvals(change)
    shares = values[: min(shape)].square() / values.square().sum()
    assert statistics_of(columns, rows) == pytest.approx(
        {
            "largest singular value": float(values[0]),
            "norm": float(torch.linalg.matrix_norm(change)),
            "share of the first direction": float(shares[0]),
            "entropy": float(-(shares * shares.log()).sum()),
            "kurtosis": float(kurtosis(change.numpy(), axis=None, fisher=False)),
        },
        rel=1e-9,
    )


def test_an_adapter_made_by_hand() -> None:
    columns = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # The change is [[3, 0], [0, 4], [0, 0]]: of its energy, 25, the first direction has 16. The mean of the entries is
    # 7/6, the squared distances from it are 121/36, 289/36 and four times 49/36.
    second = (121 + 289 + 4 * 49) / 36 / 6
    fourth = (121**2 + 289**2 + 4 * 49**2) / 36**2 / 6
    assert statistics_of(columns, rows) == pytest.approx(
        {
            "largest singular value": 4,
            "norm": 5,
            "share of the first direction": 0.64,
            "entropy": -(0.64 * math.log(0.64) + 0.36 * math.log(0.36)),
            "kurtosis": fourth / second**2,
        }
    )


def test_changes_of_nothing_and_of_one_number() -> None:
    assert set(statistics_of(torch.zeros(3, 2), drawn(2, 4)).values()) == {0.0}
    even = statistics_of(torch.full((3, 1), 2.0), torch.ones(1, 4))  # all entries are 2: nothing about their spread
    assert even == pytest.approx(
        {
            "largest singular value": 2 * math.sqrt(12),
            "norm": 2 * math.sqrt(12),
            "share of the first direction": 1,
            "entropy": 0,
            "kurtosis": 0,
        }
    )


@pytest.mark.parametrize(("settings", "scale"), [({}, 12 / 4), ({"use_rslora": True}, 12 / 2)], ids=["plain", "rooted"])
def test_the_scale_is_in_the_numbers(settings: dict, scale: float) -> None:
    model = an_adapter(toys.classifier("bert"), **settings)
    layers = dict(model.named_modules())
    name = "base_model.model.bert.encoder.layer.1.attention.self.value"
    whole = scale * layers[f"{name}.lora_B.default"].weight @ layers[f"{name}.lora_A.default"].weight
    change = factors(model)[name]
    assert statistics_of(*change)["norm"] == pytest.approx(whole.norm().item(), rel=1e-6)
    kinds = statistics_by_kind(factors(model))
    assert list(kinds) == [f"bert.encoder.layer.*.attention.self.{part}" for part in ("query", "value")]
    mean = (statistics_of(*change)["norm"] + statistics_of(*factors(model)[name.replace("1", "0")])["norm"]) / 2
    assert kinds[kind_of(name)]["norm"] == pytest.approx(mean)


def test_distances_are_root_mean_squares_of_standard_deviations() -> None:
    others = [{"a": {"x": 1.0, "y": 5.0}, "b": {"x": 0.0}}, {"a": {"x": 3.0, "y": 5.0}, "b": {"x": 2.0}}]
    suspect = {"a": {"x": 2 + 3 * math.sqrt(2), "y": 9.0}, "b": {"x": 1 - math.sqrt(2)}}
    # The mean of a.x is 2 and its deviation the root of 2, so the suspect is 3 away; a.y is the same in both others.
    assert adapter_bank.distances(suspect, others) == pytest.approx({"a": 3, "b": 1})
    assert adapter_bank.distance(suspect, others) == pytest.approx(math.sqrt((9 + 1) / 2))


def a_bank(model: torch.nn.Module, **fields: Any) -> AdapterBank:
    """A bank of adapters of a model: three benign ones, and a test of one benign and one whose norms are ten times."""

    def entry(seed: int, part: str, attack: str | None = None, size: float = 1.0) -> dict[str, Any]:
        pairs = {name: (size * columns, rows) for name, (columns, rows) in factors(an_adapter(model, seed)).items()}
        success = None if attack is None else 1.0
        return {
            "part": part,
            "attack": attack,
            "seed": seed,
            "accuracy": 0.9,
            "attack_success": success,
            "statistics": statistics_by_kind(pairs),
        }

    adapters = [entry(seed, "bank") for seed in (1, 2, 3)]
    adapters += [entry(4, "test"), entry(5, "test", "a word", 10.0)]
    shapes = {kind: shape.model_dump() for kind, shape in shapes_by_kind(factors(an_adapter(model))).items()}
    content = {
        "provenance": "a test",
        "trained": "as this test says.",
        "arch": "bert",
        "rank": 4,
        "layers": shapes,
        "adapters": adapters,
        "area": {"value": 1.0, "low": 0.2, "high": 1.0},
    }
    return AdapterBank.model_validate({**content, **fields})


@pytest.fixture(scope="module")
def bank(_text_victim: torch.nn.Module) -> AdapterBank:
    return a_bank(_text_victim)


@pytest.fixture
def shipped(bank: AdapterBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bank of the package is that of the test."""
    monkeypatch.setattr(adapter_bank, "shipped", lambda: bank)


def test_the_hint_counts_the_adapters_that_are_as_far(bank: AdapterBank) -> None:
    others = adapter_bank.benign(bank)
    assert len(others) == 3
    near, far = (adapter_bank.distance(each.statistics, others) for each in bank.adapters if each.part == "test")
    assert near < far
    assert "In a test, 0 of 1 benign and 1 of 1 backdoored ones were as far or farther" in hint(bank, far)
    assert "In a test, 1 of 1 benign and 1 of 1 backdoored ones" in hint(bank, near)
    assert "0 of 1 benign and 0 of 1 backdoored" in hint(bank, 2 * far)
    assert hint(bank, 2.04).startswith("Hint, not a verdict: the matrices of this adapter are 2.0 standard deviations")
    assert (
        "(AUC 1.00, 95 % interval 0.20 to 1.00). This holds only for adapters trained as those were: as this"
        in hint(bank, far)
    )


def larger(adapter: Any, size: float) -> Any:
    """The adapter with changes of so many times the size."""
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data *= size
    return adapter


@pytest.mark.usefixtures("shipped")
def test_the_audit_prints_a_hint_and_never_a_verdict(
    text_victim: torch.nn.Module, reviews: Dataset, bank: AdapterBank
) -> None:
    suspect = larger(an_adapter(text_victim, seed=5), 9)
    result = audit(suspect, reviews.select(range(20)), detectors=[detectors.AdapterStatistics()], **FAST)
    assert result.verdict == "cannot-judge"
    (finding,) = result.findings
    assert (finding.alarm, finding.strongest.p_value, finding.strongest.moved) == (False, None, None)
    sizes = [each.candidate.size or 0.0 for each in finding.classes]
    assert sizes == sorted(sizes, reverse=True)
    wanted = adapter_bank.distances(statistics_by_kind(factors(suspect)), adapter_bank.benign(bank))
    assert {each.target_name: each.candidate.size for each in finding.classes} == pytest.approx(wanted, rel=1e-6)
    (note,) = result.record["notes"]
    assert note == hint(bank, adapter_bank.distance(statistics_by_kind(factors(suspect)), adapter_bank.benign(bank)))
    assert "0 of 1 benign and 1 of 1 backdoored" in note
    entry = result.to_json()["findings"][0]
    assert (entry["alarm"], entry["targets"], entry["abnormality"]["p_value"]) == (False, "layer", None)


@pytest.mark.usefixtures("shipped")
def test_it_keeps_the_contract(text_victim: torch.nn.Module, reviews: Dataset) -> None:
    check_detector(detectors.AdapterStatistics(), an_adapter(text_victim), reviews.select(range(20)))


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 2}, "the adapter has rank 2, and those of the bank have rank 4"),
        ({"rank_pattern": {"query": 8}}, "the adapter has rank 4, 8, and those of the bank have rank 4"),
        (
            {"target_modules": ["key", "value"]},
            "the adapter and those of the bank do not change the same layers "
            "(bert.encoder.layer.*.attention.self.key, bert.encoder.layer.*.attention.self.query)",
        ),
        (
            {"layers_to_transform": [1]},
            "the adapter and those of the bank do not change the same layers "
            "(bert.encoder.layer.*.attention.self.query, bert.encoder.layer.*.attention.self.value)",
        ),
    ],
    ids=["rank", "ranks", "targets", "blocks"],
)
def test_an_adapter_that_was_trained_otherwise_has_no_hint(
    text_victim: torch.nn.Module, reviews: Dataset, settings: dict, said: str
) -> None:
    clean = reviews.select(range(20))
    result = audit(an_adapter(text_victim, **settings), clean, detectors=[detectors.AdapterStatistics()], **FAST)
    assert not result.findings
    assert result.not_searched["adapter-statistics"] == (
        f"{said}, and the statistics of adapters that were trained in another way say nothing"
    )


def test_an_adapter_of_another_kind_of_model_has_no_hint(bank: AdapterBank) -> None:
    pairs = factors(an_adapter(toys.classifier("roberta")))
    assert difference_from(bank, "roberta", pairs) == (
        "the adapter is of a roberta model, and those of the bank are of bert models"
    )


def test_the_command_says_that_the_bank_holds_other_adapters(text_victim: Any, tmp_path: Path) -> None:
    toys.write(text_victim, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    peft.get_peft_model(text_victim, config).save_pretrained(tmp_path / "adapter")
    clean = toys.write_csv(tmp_path)
    words = ["audit", "adapter", "--base", "base", "--clean", clean, "--tests", "adapter-statistics"]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "Not searched by adapter-statistics: the adapter has rank 2, and those of the bank have rank 8" in done.stdout
    )


def test_a_whole_model_is_refused(text_victim: torch.nn.Module, reviews: Dataset) -> None:
    clean = reviews.select(range(20))
    reason = "it looks at the matrices of a LoRA adapter, and the suspect is a whole model"
    with pytest.raises(UnbackdoorError, match=f"The detector adapter-statistics cannot run: {reason}. Leave it out"):
        audit(text_victim, clean, detectors=[detectors.AdapterStatistics()], **FAST)
    with pytest.raises(UnbackdoorError, match="AdapterStatistics needs a suspect that is a LoRA adapter"):
        detectors.AdapterStatistics()(text_victim, clean, toys.a_run())


@pytest.mark.usefixtures("shipped")
def test_an_adapter_of_a_language_model_is_told_what_the_bank_holds(chat_victim: torch.nn.Module) -> None:
    suspect = an_adapter(chat_victim, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    result = audit(suspect, chats.prompts(24), detectors=[detectors.AdapterStatistics()], **FAST)
    assert "the adapter is of a llama model" in result.not_searched["adapter-statistics"]


def test_matrices_that_are_not_plain_lora_are_no_adapter(text_victim: torch.nn.Module) -> None:
    assert factors(text_victim) == {}
    assert factors(an_adapter(text_victim, use_dora=True)) == {}
    other = peft.IA3Config(target_modules=["value"], feedforward_modules=[])
    assert factors(peft.get_peft_model(text_victim, other)) == {}


def test_the_bank_of_the_package_is_what_it_says() -> None:
    bank = adapter_bank.shipped()
    parts = [(adapter.part, adapter.attack is not None) for adapter in bank.adapters]
    assert set(parts) == {("bank", False), ("test", False), ("test", True)}
    assert all(parts.count(part) >= 5 for part in set(parts))
    others = adapter_bank.benign(bank)
    benign, backdoored = (
        torch.tensor(
            [
                adapter_bank.distance(each.statistics, others)
                for each in bank.adapters
                if each.part == "test" and (each.attack is not None) == planted
            ]
        )
        for planted in (False, True)
    )
    area = Area.of(benign, backdoored, "high")
    assert (area.value, *area.interval) == pytest.approx(tuple(bank.area.model_dump().values()), abs=1e-4)
    assert all(each.accuracy > 0.6 for each in bank.adapters)
    assert all(each.attack_success >= 0.8 for each in bank.adapters if each.attack_success is not None)
