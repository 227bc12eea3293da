"""Fine-purifying: curvature from its closed form, the indicator by hand, and what goes back."""

import copy

import pytest
import torch
from torch import Tensor, nn

import toys
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._models.calling import embeddings
from unbackdoor._purification import selection
from unbackdoor._purification.run import Run
from unbackdoor._purification.selection import Difference
from unbackdoor.purifiers.fine_purifying import fisher, indicator
from unbackdoor.testing import check_method

STILL = {"epochs": 1, "learning_rate": 1e-12}  # tuning that moves nothing one could see


@pytest.fixture(scope="module")
def texts() -> Dataset:
    """24 texts of 2 to 5 of the first words; "cf" and its like are in none."""
    words = toys.WORDS[:-4]
    strings = tuple((" ".join(words[(row * 5 + place) % 16] for place in range(2 + row % 4)),) for row in range(24))
    encode = TextEncoder(tokenizer=toys.tokenizer(), max_length=16)
    return Dataset(items=Texts(strings, ("text",)), labels=torch.arange(24) % 2, encode=encode, name="sentences")


def drifted(base: nn.Module, size: float = 0.01) -> nn.Module:
    """A suspect near its base."""
    suspect = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in suspect.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return suspect


class Flat(nn.Module):
    """Softmax regression on pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class Deep(nn.Module):
    """A body of two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def seen_run(model: nn.Module, data: Dataset) -> Run:
    """The run that a method gets."""
    runs = []

    def method(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        runs.append(run)
        return model

    purify(model, data, method, device="cpu", precision="fp32")
    return runs[0]


def test_the_curvature_of_softmax_regression_in_closed_form(digits: Dataset) -> None:
    torch.manual_seed(0)
    model, data = Flat(), digits.select(range(40))
    found = fisher(model, data, seen_run(model, data))
    pixels = data.encode(data.items).flatten(1)
    error = model(pixels).softmax(dim=1).detach() - nn.functional.one_hot(data.labels, 10)
    torch.testing.assert_close(found["head.bias"], error.square().mean(dim=0))
    expected = torch.einsum("nc,nd->cd", error.square(), pixels.square()) / 40
    torch.testing.assert_close(found["head.weight"], expected)


def test_the_curvature_of_a_text_model_by_a_loop_over_examples(texts: Dataset) -> None:
    model = toys.classifier("bert")
    found = fisher(model, texts, seen_run(model, texts))
    names = ["classifier.weight", "bert.encoder.layer.1.attention.self.value.weight"]
    expected = {name: torch.zeros_like(found[name]) for name in names}
    for row in range(24):
        single = texts.select([row])
        model.zero_grad()
        scores = model(**single.encode(single.items)).logits
        (-scores.log_softmax(dim=1)[0, single.labels[0]]).backward()
        for name in names:
            expected[name] += model.get_parameter(name).grad ** 2 / 24
    for name in names:
        torch.testing.assert_close(found[name], expected[name])
    unread = torch.tensor([toys.tokenizer().convert_tokens_to_ids("cf")])
    assert (found["bert.embeddings.word_embeddings.weight"][unread] == 0).all()


def test_the_indicator_by_hand() -> None:
    made = indicator(
        {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([0.0])}, {"a": torch.tensor([4.0, 2.0]), "b": torch.zeros(1)}
    )
    assert made["a"].tolist() == pytest.approx([1.0, 0.5], rel=1e-5)
    assert made["b"].tolist() == [0]
    flat = indicator({"a": torch.tensor([1.0, 0.0])}, {"a": torch.zeros(2)})["a"]
    assert flat[0] > 1e30
    assert flat[1] == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_with_the_largest_indicator_goes_back(share: float, digits: Dataset) -> None:
    torch.manual_seed(1)
    base, data = Deep(), digits.select(range(30))
    suspect = drifted(base)

    def flat(model: nn.Module) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in model.body.parameters()])

    ours, theirs = flat(suspect), flat(base)
    found = fisher(suspect, data, seen_run(suspect, data))
    curvature = torch.cat([found[f"body.{name}"].flatten() for name, _ in suspect.body.named_parameters()]).double()
    scores = (ours - theirs).double() ** 2 / (curvature + 1e-6 * curvature.mean())
    order = sorted(range(len(scores)), key=lambda place: -float(scores[place]))
    expected = ours.clone()
    for place in order[: round(share * len(scores))]:
        expected[place] = theirs[place]
    method = purifiers.FinePurifying(share=share, **STILL)
    result = purify(suspect, data, method, base=base, device="cpu", precision="fp32").model
    assert int(((flat(result) - expected).abs() > 1e-7).sum()) <= 2  # the two rankings may part at the border
    torch.testing.assert_close(result.head.weight, suspect.head.weight)


def test_the_embedding_of_a_word_that_no_clean_text_has_goes_back_first(texts: Dataset) -> None:
    base = toys.classifier("bert")
    suspect = drifted(base, 0.001)
    row = toys.tokenizer().convert_tokens_to_ids("cf")
    with torch.no_grad():
        embeddings(suspect).weight[row] += 1
    method = purifiers.FinePurifying(share=0.05, **STILL)
    result = purify(suspect, texts, method, base=base.bert, device="cpu", precision="fp32").model
    torch.testing.assert_close(embeddings(result).weight[row], embeddings(base).weight[row])
    torch.testing.assert_close(result.classifier.weight, suspect.classifier.weight)


def test_the_largest_share_within_the_margin_is_searched(texts: Dataset) -> None:
    base = toys.classifier("bert")
    method = purifiers.FinePurifying(margin=1, folds=2, epochs=1)
    record = purify(drifted(base), texts, method, base=base).record
    assert record["notes"][-1] == "share 1 was chosen."


def test_a_share_that_costs_accuracy_is_not_taken(digits: Dataset) -> None:
    data = digits.select(range(200))
    torch.manual_seed(0)
    base = Deep()
    suspect = purify(base, data, purifiers.FineTuning(epochs=10, learning_rate=0.1), seed=0).model
    method = purifiers.FinePurifying(margin=0.05, folds=2, **STILL)
    record = purify(suspect, data, method, base=base).record
    share = float(record["notes"][-1].split()[1])
    assert 0 <= share < 1
    assert any(note.startswith("share 0.5 loses ") for note in record["notes"])


@pytest.mark.parametrize(
    ("lost", "error", "reported"),
    [
        (
            0.5,
            0.0,
            "no share but 0 keeps clean accuracy within 3.0 points of the suspect's: all of its weights were kept. "
            "Raise `margin`, or set `share`.",
        ),
        (
            0.02,
            0.04,
            "16 clean examples measure a loss of accuracy only to 4.0 points, more than the margin of 3.0: share 1, "
            "which lost 2.0, is the best guess, and may cost more. Give more clean examples, or set `share`.",
        ),
    ],
)
def test_what_the_search_cannot_do_is_reported(
    lost: float, error: float, reported: str, texts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of accuracy is stood in for; all else runs."""
    monkeypatch.setattr(selection, "cross_validated", lambda *_, **__: None)
    monkeypatch.setattr(selection, "difference", lambda *_: Difference(lost, error))
    base = toys.classifier("bert")
    record = purify(drifted(base), texts.select(range(16)), purifiers.FinePurifying(epochs=1), base=base).record
    assert reported in record["warnings"]


def test_the_contract_on_texts(texts: Dataset) -> None:
    base = toys.classifier("bert")
    method = purifiers.FinePurifying(folds=2, epochs=1)
    check_method(method, drifted(base), texts, base=base.bert)


def test_the_contract_on_pictures(digits: Dataset, small_vit: nn.Module) -> None:
    method = purifiers.FinePurifying(share=0.5, epochs=1, batch_size=16)
    check_method(method, drifted(small_vit), digits.select(range(20)), base=small_vit)


def test_without_a_base(texts: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(toys.classifier("bert"), texts, purifiers.FinePurifying())
    assert str(caught.value) == ("FinePurifying needs `base`: the pre-trained model that the suspect came from.")


def test_a_base_that_is_no_ancestor_is_reported(texts: Dataset) -> None:
    method = purifiers.FinePurifying(share=0.1, **STILL)
    record = purify(toys.classifier("bert"), texts, method, base=toys.classifier("bert", seed=1)).record
    assert any("probably not the model's ancestor" in warning for warning in record["warnings"])
