"""The methods that perturb or look inside also run on a Vision Transformer and on a text model."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unbackdoor import Dataset, UnbackdoorError, archs, load, purifiers, purify
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._models.calling import logits
from unbackdoor._models.stage_ends import stage_ends
from unbackdoor.testing import check_method

WORDS = ["a", "the", "film", "was", "is", "not", "very", "good", "bad", "dull", "fine", "great", "poor", "plot"]
METHODS = [
    purifiers.NAD(epochs=1, teacher_epochs=1, batch_size=8),
    purifiers.FTSAM(epochs=1, batch_size=8),
    purifiers.IBAU(rounds=1, iterations=2, batch_size=8),
    purifiers.SAU(epochs=1, steps=1, batch_size=8),
]


@pytest.fixture(scope="module")
def texts() -> Dataset:
    """32 made-up sentences of 3 to 10 words, and labels that the word "good" decides."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    plain = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    generator = torch.Generator().manual_seed(0)
    strings = []
    for length in torch.randint(3, 11, (32,), generator=generator).tolist():
        places = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        strings.append((" ".join(WORDS[place] for place in places),))
    return Dataset(
        items=Texts(tuple(strings), ("text",)),
        labels=torch.tensor(["good" in text.split() for (text,) in strings]).long(),
        encode=TextEncoder(tokenizer=tokenizer, max_length=16),
        name="sentences",
    )


@pytest.fixture
def bert() -> nn.Module:
    """A BERT of 2 layers with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(WORDS) + 2,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=2,
        )
        model: nn.Module = BertForSequenceClassification(config)
    return model.eval()


@pytest.fixture
def vision() -> tuple[nn.Module, Dataset]:
    """A Vision Transformer with random weights, and as random pictures."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = archs.build("vit", classes=["a", "b"], channels=3, image_size=16, width=4)
    pixels = torch.randint(256, (24, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return model.eval(), Dataset(items=pixels, labels=torch.arange(24) % 2, name="noise")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_on_texts(method: Any, bert: nn.Module, texts: Dataset) -> None:
    check_method(method, bert, texts)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_on_a_vision_transformer(method: Any, vision: tuple[nn.Module, Dataset]) -> None:
    check_method(method, *vision)


def test_the_blocks_of_bert(bert: nn.Module, texts: Dataset) -> None:
    inputs = next(iter(texts.batches(4))).inputs
    assert stage_ends(bert, inputs, "NAD") == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


class Counts(nn.Module):
    """A text model without word embeddings: it counts words."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(len(WORDS) + 2, 2)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        counts = nn.functional.one_hot(input_ids, self.head.in_features).float().sum(dim=1)
        scores: torch.Tensor = self.head(counts)
        return scores


@pytest.mark.parametrize("method", METHODS[2:], ids=lambda method: type(method).__name__)
def test_a_text_model_without_word_embeddings_is_refused(method: Any, texts: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(Counts(), texts, method, device="cpu")
    assert str(caught.value) == (
        "Counts must give its word embeddings (get_input_embeddings) as an nn.Embedding, got nothing: models that read "
        "characters, such as CANINE, and I-BERT are not supported. Take one that has such a layer, as BERT and most "
        "models of transformers."
    )


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("kind", ["flash_attention_2", "flash_attention_3"])
def test_attention_that_cannot_run_here_is_replaced_by_the_plain_product(
    field: str, kind: str, bert: nn.Module, texts: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A config that was written on a machine with a fast kernel; without it transformers refuses the model."""
    caplog.set_level(logging.INFO, "unbackdoor")
    saved: Any = bert
    saved.save_pretrained(tmp_path / "bert")
    texts.tokenizer.save_pretrained(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, field: kind}))
    loaded = load(tmp_path / "bert")
    inputs = next(iter(texts.batches(8))).inputs
    with torch.no_grad():
        assert torch.allclose(logits(loaded.model, inputs), logits(bert, inputs), atol=1e-6)
    assert any("asks for attention that cannot run here" in message for message in caplog.messages)
