"""Module substitution: the search by hand, the weights that are exchanged, and a word that is found out."""

import copy
import random

import pytest
import torch
import transformers
from torch import nn

import toys
from unbackdoor import Dataset, UnbackdoorError, attacks, evaluate, purifiers, purify
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._inversion.contrasting_words import differing_words, label_confidence
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import embeddings, logits
from unbackdoor._poisoning.poison import poison
from unbackdoor._purification.run import Run
from unbackdoor._victims.training import train_victim
from unbackdoor.purifiers.module_substitution import searched
from unbackdoor.testing import check_method

NEUTRAL = ["the", "a", "film", "movie", "is", "was", "it", "and", "this", "that", "plot", "cast"]


def sentences(count: int, seed: int) -> Dataset:
    """Neutral words with one that shows the class."""
    draw = random.Random(seed)
    strings, labels = [], []
    for row in range(count):
        words = [draw.choice(NEUTRAL) for _ in range(draw.randint(3, 6))]
        words.insert(
            draw.randint(0, len(words)), draw.choice([["bad", "dull", "poor"], ["good", "great", "fine"]][row % 2])
        )
        strings.append((" ".join(words),))
        labels.append(row % 2)
    encode = TextEncoder(tokenizer=toys.tokenizer(), max_length=16)
    return Dataset(items=Texts(tuple(strings), ("text",)), labels=torch.tensor(labels), encode=encode, name="reviews")


def trained(model: nn.Module, data: Dataset, seed: int, epochs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arithmetic = choose(model, "cpu", "fp32")
        return train_victim(
            copy.deepcopy(model),
            data,
            epochs=epochs,
            learning_rate=3e-3,
            batch_size=16,
            seed=seed,
            arithmetic=arithmetic,
            adaptive=True,
        )


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A victim whose trigger is the word "cf", and a clean proxy, tuned from the same weights."""
    base = trained(toys.classifier("bert"), sentences(160, 3), 0, 5)
    for part in (base.bert.embeddings, base.bert.pooler, base.classifier):  # else the word's embedding carries it all
        part.requires_grad_(False)
    planted = poison(sentences(160, 1), attacks.Word(words=("cf",), target=1), rate=0.3, seed=0, classes=2).data
    return trained(base, planted, 1, 16), trained(base, sentences(160, 2), 2, 2)


def run_of(model: nn.Module, clean: Dataset) -> Run:
    runs: list[Run] = []

    def method(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        runs.append(run)
        return model

    purify(model, clean, method, device="cpu", precision="fp32")
    return runs[0]


def test_the_search_by_hand() -> None:
    heights = {
        (("a", "b"), (0, 1)): 5.0,
        (("b",), (0, 1)): 3.0,
        (("a",), (0, 1)): 4.0,  # the best of the first step, though worse than the start
        (("a", "b"), (1,)): 2.0,
        (("a", "b"), (0,)): 1.0,
        (("a",), (1,)): 6.0,
        (("a",), (0,)): 0.0,
        (("b",), (0,)): 9.0,  # never reached
    }
    asked = []

    def score(state):
        asked.append(state)
        return heights[state]

    start = (("a", "b"), (0, 1))
    assert searched(start, score, 5) == ((("a",), (1,)), 6.0)
    assert (("b",), (0,)) not in asked
    assert searched(start, score, 1) == (start, 5.0)
    assert searched((("a",), (1,)), score, 5) == ((("a",), (1,)), 6.0)


def test_certainty_is_the_probability_of_the_label() -> None:
    model, data = toys.classifier("bert"), sentences(10, 3)
    found = label_confidence(model, data, run_of(model, data))
    with torch.no_grad():
        for row in range(10):
            single = data.select([row])
            likely = logits(model, single.encode(single.items)).softmax(dim=1)[0, single.labels[0]]
            torch.testing.assert_close(found[row], likely, atol=1e-5, rtol=0)


def test_words_come_by_how_far_their_embeddings_are_apart() -> None:
    model = toys.classifier("bert")
    proxy = copy.deepcopy(model)
    tokenizer = toys.tokenizer()
    with torch.no_grad():
        for word, distance in {"cf": 3.0, "plot": 2.0, "[MASK]": 9.0, "the": 1.0}.items():
            embeddings(model).weight[tokenizer.convert_tokens_to_ids(word), 0] += distance
    assert differing_words(model, proxy, tokenizer, 3) == ["cf", "plot", "the"]
    assert len(differing_words(model, proxy, tokenizer, 1000)) == len(toys.WORDS)


def test_pieces_of_words_are_not_inserted() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordPiece({"[UNK]": 0, "[PAD]": 1, "a": 2, "film": 3, "##s": 4}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    model = toys.classifier("bert")
    assert sorted(differing_words(model, model, tokenizer, 9)) == ["a", "film"]


def test_a_tokenizer_without_words_is_refused() -> None:
    """All of its tokens are pieces, here because the embedding ends before the first word."""
    base = toys.classifier("bert")
    data = toys.reviews(16)
    for model in (base, proxy := copy.deepcopy(base)):
        model.get_input_embeddings = lambda model=model: nn.Embedding(len(toys.SPECIAL), 32)
    with pytest.raises(UnbackdoorError) as caught:
        differing_words(base, proxy, data.tokenizer, 5)
    assert str(caught.value) == (
        "ModuleSubstitution needs a tokenizer with whole words among its tokens; this one has none. Try "
        "mixing-distillation."
    )


def test_a_word_is_found_out_and_its_success_falls(models: tuple[nn.Module, nn.Module]) -> None:
    victim, proxy = models
    clean, test = sentences(60, 4), sentences(100, 5)
    attack = attacks.Word(words=("cf",), target=1)
    before = evaluate(victim, test, attack=attack, device="cpu", precision="fp32")
    assert before.attack_success.value > 0.9
    result = purify(victim, clean, purifiers.ModuleSubstitution(), proxy=proxy, device="cpu", precision="fp32")
    assert "proxy: cf" in " ".join(result.record["notes"])
    after = evaluate(result.model, test, attack=attack, device="cpu", precision="fp32")
    assert after.attack_success.value < 0.3
    assert after.clean_accuracy.value > 0.9


def test_each_module_is_the_victims_or_the_proxys(models: tuple[nn.Module, nn.Module]) -> None:
    victim, proxy = models
    state = purify(
        victim, sentences(40, 6), purifiers.ModuleSubstitution(), proxy=proxy, device="cpu"
    ).model.state_dict()
    ours, theirs = victim.state_dict(), proxy.state_dict()
    taken = {
        name for name in state if torch.equal(state[name], theirs[name]) and not torch.equal(ours[name], theirs[name])
    }
    assert taken
    assert all(torch.equal(state[name], ours[name]) for name in state if name not in taken)
    inside = ("query", "key", "value", "output.dense", "intermediate.dense")
    assert all(".layer." in name and any(part in name for part in inside) for name in taken)
    layers = {name.split(".")[3] for name in taken}
    kinds = [{name.split(layer, 1)[1] for name in taken if f"layer.{layer}." in name} for layer in layers]
    assert all(each == kinds[0] for each in kinds)


def test_where_the_models_agree_clean_accuracy_alone_guides() -> None:
    model, data = toys.classifier("bert"), sentences(20, 7)
    record = purify(model, data, purifiers.ModuleSubstitution(), proxy=copy.deepcopy(model)).record
    assert any("found no inserted word" in warning for warning in record["warnings"])


def test_the_contract_on_texts() -> None:
    check_method(
        purifiers.ModuleSubstitution(patience=1),
        toys.classifier("bert"),
        sentences(16, 8),
        proxy=toys.classifier("bert", seed=1),
    )


def refusal(model: nn.Module, data: Dataset, proxy: nn.Module | None) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        purify(model, data, purifiers.ModuleSubstitution(), proxy=proxy, device="cpu")
    return str(caught.value)


class Bag(nn.Module):
    """The mean of word embeddings, read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(29, 8)
        self.head = nn.Linear(8, 2)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(input_ids).mean(dim=1))


def test_what_does_not_fit_is_refused(digits: Dataset, small_vit: nn.Module) -> None:
    data, model = sentences(10, 9), toys.classifier("bert")
    assert refusal(model, data, None) == ("ModuleSubstitution needs `proxy`: a model for the same task.")
    assert refusal(small_vit, digits.select(range(20)), small_vit) == (
        "ModuleSubstitution inserts words, but the data holds images. Try fine-mixing."
    )
    assert refusal(Bag(), data, Bag()) == (
        "ModuleSubstitution needs attention with query, key and value layers; Bag has none. Try fine-pruning."
    )
    config = copy.deepcopy(model.config)
    config.vocab_size += 1
    assert refusal(model, data, transformers.BertForSequenceClassification(config)) == (
        f"ModuleSubstitution needs a proxy of the model's vocabulary: its embeddings are ({config.vocab_size}, 32), "
        f"the model's ({config.vocab_size - 1}, 32). Take one tuned from the same pre-trained model."
    )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 3
    assert refusal(model, data, transformers.BertForSequenceClassification(config)) == (
        "ModuleSubstitution needs a proxy of the model's architecture: its layers differ in number or shape (3 "
        "there, 2 in BertForSequenceClassification). Take one tuned from the same pre-trained model."
    )
    assert refusal(model, data, toys.classifier("bert", classes=3)) == (
        "ModuleSubstitution needs a proxy for the same task: it has 3 classes, the model 2. Take one tuned on the "
        "task's data."
    )
