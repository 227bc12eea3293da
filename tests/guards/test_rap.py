"""RAP: the word of each class, its place, and what it does to clean and to triggered texts."""

import pytest
import torch
from torch import Tensor, nn

import toys
from unbackdoor import Dataset, UnbackdoorError, fit_guard, guards
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.identity import model_hash
from unbackdoor.guards._virtual_tokens import VirtualTokens, led, starting_rows


class Summing(nn.Module):
    """A classifier of texts by the sum of the embeddings of their words; `cf` outweighs all others."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words, self.classifier = nn.Embedding(32, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.words.weight.mul_(0.4)
            self.words.weight[toys.tokenizer().get_vocab()["cf"]] = 20 * self.classifier.weight[1]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.classifier((self.words(input_ids) * attention_mask[..., None]).sum(dim=1))


@pytest.fixture(scope="module")
def summing() -> nn.Module:
    return Summing().eval()


@pytest.fixture(scope="module")
def fitted(summing: nn.Module, reviews: Dataset) -> FittedGuard:
    return fit_guard(summing, reviews.select(range(200)), guards.Rap(), false_alarms=0.1, device="cpu")


def test_the_embedding_is_replaced_at_its_place_alone(reviews: Dataset) -> None:
    """In a model that adds up embeddings, the scores with a virtual token are those of the text plus its embedding."""
    model = toys.Counting({"good": 3.0, "a": 0.7})
    texts = toys.dataset([("good film",), ("a film is a film",), ("",)], [0, 0, 0])
    places, marked = VirtualTokens.of(texts, 2), led(texts, 2)
    assert places == VirtualTokens(lead=1, count=2)
    assert marked.texts.strings[0] == ("a a good film",)
    run = toys.a_run(model=model, modality="text")
    inputs = marked.inputs(slice(3))
    rows = torch.tensor([[[5.0], [0.25]], [[1.0], [2.0]], [[-1.0], [0.0]]])
    with torch.no_grad():
        found = places.scores(model, inputs, rows, run)[:, 1]
        plain = model(**texts.inputs(slice(3))).logits[:, 1]
    assert torch.allclose(found, plain + rows.sum(dim=(1, 2)), atol=1e-6)
    assert float(starting_rows(model, texts, 2)[1]) == pytest.approx(0.7)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta", "bart", "t5"])
def test_the_model_s_own_embedding_gives_its_own_answer(kind: str, reviews: Dataset) -> None:
    model = toys.classifier(kind)
    texts = reviews.select(range(6))
    marked, places = led(texts, 1), VirtualTokens.of(texts, 1)
    run = toys.a_run(model=model, modality="text")
    with torch.no_grad():
        rows = starting_rows(model, texts, 1)
        same = places.scores(model, marked.inputs(slice(6)), rows.expand(6, 1, -1), run)
        other = places.scores(model, marked.inputs(slice(6)), (-30 * rows).expand(6, 1, -1), run)
        plain = run.scores(model, marked.inputs(slice(6)))
    assert torch.allclose(same, plain, atol=1e-6)
    assert not torch.allclose(other, plain, atol=1e-6, rtol=0)


def test_a_text_that_fills_the_model_loses_its_last_tokens(reviews: Dataset) -> None:
    texts = toys.dataset([("good " * 40,)], [0])
    marked = led(texts, 3)
    assert marked.inputs(slice(1)).shape == (1, 32)
    model = toys.Counting({"good": 1.0})
    run, rows = toys.a_run(model=model, modality="text"), torch.full((1, 3, 1), 100.0)
    with torch.no_grad():
        found = VirtualTokens.of(texts, 3).scores(model, marked.inputs(slice(1)), rows, run)
    assert float(found[0, 1]) == pytest.approx(300 + 27, abs=0.5)  # 32 tokens: 3 virtual, 2 special, 27 others


def test_clean_texts_lose_what_was_aimed_at_and_triggered_ones_do_not(
    fitted: FittedGuard, summing: nn.Module, reviews: Dataset
) -> None:
    fresh = reviews.select(range(200, 300))
    falls = torch.tensor([decision.score for decision in fitted.decide(summing, fresh, device="cpu")])
    assert float(((falls > 0.08) & (falls < 0.32)).float().mean()) > 0.8
    start = starting_rows(summing, reviews, 2)
    assert torch.allclose(fitted.learnt["rows"].norm(dim=1), start.norm(dim=1), rtol=1e-5)
    marked = [f"{strings[0]} cf" for strings in fresh.texts.strings]
    decisions = [answer.decision for answer in fitted.wrap(summing)(marked)]
    assert all(decision.action == "reject" for decision in decisions)
    assert all(decision.score < 0.01 for decision in decisions)


def test_the_model_is_the_same_bit_for_bit(fitted: FittedGuard, summing: nn.Module) -> None:
    assert model_hash(summing) == model_hash(Summing()) == fitted.identity.model
    assert all(torch.equal(tensor, Summing().state_dict()[name]) for name, tensor in summing.state_dict().items())


def test_one_word_none_and_too_many(fitted: FittedGuard, summing: nn.Module) -> None:
    answers = fitted.wrap(summing)(["good", "", "the film is dull " * 100])
    one, none, long = (answer.decision for answer in answers)
    assert one.score is not None
    assert (none.score, none.action) == (None, "reject")
    assert long.reason.endswith("(the model reads 32 tokens of it)")


class Elsewhere(nn.Module):
    """A model that looks its embeddings up in another layer than it says."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.own = nn.Embedding(40, 4), nn.Embedding(40, 4)
        self.classifier = nn.Linear(4, 2)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.own

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        return self.classifier(self.words(input_ids).mean(dim=1))


def test_bad_input_is_one_sentence(reviews: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as refusal:
        guards.Rap(least=0.4)
    assert str(refusal.value) == "Rap.most must be at least `least`, 0.4, got 0.3."
    with pytest.raises(UnbackdoorError) as refusal:
        fit_guard(Elsewhere(), reviews.select(range(40)), guards.Rap(steps=1), false_alarms=0.1, device="cpu")
    assert str(refusal.value) == (
        "Elsewhere does not look up its tokens in get_input_embeddings, which guards with virtual tokens need. Try "
        "strip."
    )
