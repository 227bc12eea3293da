"""Fine-pruning: the dormant go first, as many as clean accuracy allows, and stay away while tuning."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import toys
from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._data.texts import TextEncoder, Texts


class Half(nn.Module):
    """Reads its 64 pixels twice, the second time at a thousandth: those neurons are dormant."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.last(torch.cat([x, x / 1000], dim=1))


@pytest.fixture
def half(digits: Dataset) -> Half:
    """One that is right on the digits, by its awake half."""
    torch.manual_seed(0)
    return purify(Half(), digits, purifiers.FineTuning(epochs=5, learning_rate=0.05), seed=0).model  # type: ignore[return-value]


def test_dormant_neurons_go_and_the_awake_that_matter_stay(half: Half, digits: Dataset) -> None:
    data = digits.select(range(500))
    result = purify(half, data, purifiers.FinePruning(epochs=0, tolerance=0.02, step=0.1), seed=0)
    dead = (result.model.last.weight == 0).all(dim=0)
    assert dead[64:].all()
    assert not dead[:64].all()
    assert result.record["clean"]["held_out"] == 100
    assert result.record["notes"] == [f"FinePruning pruned {int(dead.sum())} of 128 neurons."]


def test_what_was_pruned_stays_pruned(half: Half, digits: Dataset) -> None:
    data = digits.select(range(300))
    pruned, tuned = (
        purify(half, data, purifiers.FinePruning(epochs=epochs), seed=0).model.last.weight for epochs in (0, 2)
    )
    dead = (pruned == 0).all(dim=0)
    assert dead.any()
    assert torch.equal((tuned == 0).all(dim=0), dead)
    assert not torch.equal(pruned, tuned)


def test_a_tolerance_of_1_leaves_the_last_group(small_cnn: SmallCNN, digits: Dataset) -> None:
    method = purifiers.FinePruning(epochs=0, tolerance=1.0, step=0.25)
    weight = purify(small_cnn, digits.select(range(60)), method, seed=0).model.classifier.weight
    assert int((weight == 0).all(dim=0).sum()) == 3 * 512 // 4


def test_in_a_transformer_neurons_of_the_last_feed_forward_block_go(digits: Dataset, small_vit: nn.Module) -> None:
    method = purifiers.FinePruning(epochs=0, tolerance=1.0, step=0.25)
    result = purify(small_vit, digits.select(range(60)), method, seed=0).model
    changed = [
        name for name, tensor in small_vit.state_dict().items() if not torch.equal(tensor, result.state_dict()[name])
    ]
    assert len(changed) == 1
    weight = result.state_dict()[changed[0]]
    assert weight.shape == (12, 24)
    assert int((weight == 0).all(dim=0).sum()) == 18


def bert_and_texts(tmp_path: Path) -> tuple[nn.Module, Dataset]:
    """A random BERT of two layers with a vocabulary of eight words, and 40 sentences."""
    words = ["good", "bad", "fine", "poor", "film", "plot", "very", "not"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    strings = tuple((" ".join(words[(row + place) % 8] for place in range(2 + row % 4)),) for row in range(40))
    items = Texts(strings, ("text",))
    labels = torch.arange(40) % 2
    return model.eval(), Dataset(items=items, labels=labels, encode=TextEncoder(tokenizer=tokenizer, max_length=16))


def test_a_text_model_is_pruned_too(tmp_path: Path) -> None:
    model, data = bert_and_texts(tmp_path)
    method = purifiers.FinePruning(epochs=1, tolerance=1.0, step=0.25)
    weight = purify(model, data, method, seed=0).model.bert.encoder.layer[1].output.dense.weight
    assert int((weight == 0).all(dim=0).sum()) == 24


def test_the_layers_of_gpt2_are_read_the_other_way_round() -> None:
    model, data = toys.classifier("gpt2"), toys.reviews(40)
    result = purify(model, data, purifiers.FinePruning(epochs=0, tolerance=1.0, step=0.25), seed=0)
    width = model.config.n_inner or 4 * model.config.n_embd
    assert result.record["notes"] == [f"FinePruning pruned {3 * width // 4} of {width} neurons."]
    weight = result.model.transformer.h[-1].mlp.c_proj.weight  # (inputs, outputs)
    assert weight.shape[0] == width
    assert int((weight == 0).all(dim=1).sum()) == 3 * width // 4


def test_nothing_pruned_is_a_warning(small_cnn: SmallCNN, digits: Dataset) -> None:
    """All neurons but one at once is more than an answer survives."""
    model = purify(small_cnn, digits, purifiers.FineTuning(epochs=2, learning_rate=0.05), seed=0).model
    result = purify(model, digits.select(range(100)), purifiers.FinePruning(step=0.9, epochs=0, tolerance=0), seed=0)
    assert result.record["warnings"][0] == (
        "FinePruning pruned nothing of 512 neurons: clean accuracy on 20 held-out examples allows pruning none. "
        "Raise its `tolerance`."
    )


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        (purifiers.ANP(), "BatchNorm layers"),
        (purifiers.CLP(), "convolutions followed by BatchNorm"),
        (purifiers.RNP(), "BatchNorm layers"),
        (purifiers.BNA(), "BatchNorm layers"),
    ],
    ids=lambda part: "" if isinstance(part, str) else type(part).__name__,
)
def test_the_others_refuse_a_text_model(method, needs: str, tmp_path: Path) -> None:
    model, data = bert_and_texts(tmp_path)
    with pytest.raises(UnbackdoorError) as caught:
        purify(model, data, method)
    assert str(caught.value) == (
        f"{type(method).__name__} needs {needs} with weights and statistics; BertForSequenceClassification has none. "
        "Try fine-pruning."
    )


def test_a_trigger_among_pixels_is_not_looked_for_in_texts(tmp_path: Path) -> None:
    model, data = bert_and_texts(tmp_path)
    with pytest.raises(UnbackdoorError, match=r"^ShortcutSuppression searches pixels for a trigger, but .* Try pam,"):
        purify(model, data, purifiers.ShortcutSuppression())
