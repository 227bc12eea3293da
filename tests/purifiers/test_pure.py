"""PURE: heads are scored by hand and pruned as said; what is folded answers as what is hooked."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import toys
from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, archs, purifiers, purify
from unbackdoor._data.texts import TextEncoder, Texts, Tokens
from unbackdoor._models.attention import PARTS, blocks, first_rows, spread
from unbackdoor._models.calling import logits, probe
from unbackdoor.purifiers.pure import layer_weights, lengths
from unbackdoor.testing import check_method

QUICK = purifiers.PURE(score_epochs=1, epochs=1, batch_size=16)
SIZES = {"vocab_size": 40, "pad_token_id": 0, "num_labels": 2, "max_position_embeddings": 40}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.fixture(scope="module")
def texts() -> Dataset:
    """32 different texts of 2 to 5 words."""
    words = toys.WORDS
    strings = tuple(
        (" ".join(words[(row + 7 * place) % len(words)] for place in range(2 + row % 4)),) for row in range(32)
    )
    encode = TextEncoder(tokenizer=toys.tokenizer(), max_length=16)
    return Dataset(items=Texts(strings, ("text",)), labels=torch.arange(32) % 2, encode=encode, name="sentences")


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (16, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Dataset(items=pixels, labels=torch.arange(16) % 2, name="noise")


def built(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "vit":
            return archs.build("vit", classes=["a", "b"], channels=3, image_size=16, width=4).eval()
        made = {
            "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **SMALL)),
            "roberta": lambda: transformers.RobertaForSequenceClassification(
                transformers.RobertaConfig(**SIZES, **SMALL)
            ),
            "distilbert": lambda: transformers.DistilBertForSequenceClassification(
                transformers.DistilBertConfig(**SIZES, dim=16, n_layers=2, n_heads=4, hidden_dim=32)
            ),
            "llama": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, **SMALL)),
        }[kind]()
        for name, parameter in made.named_parameters():  # biases are zero at first, which would hide them
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return made.eval()


ENCODERS = ["bert", "roberta", "distilbert", "vit"]


def test_the_variance_of_a_row_by_hand() -> None:
    row = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0]], [[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    found = spread(row, Tokens({"input_ids": mask, "attention_mask": mask}))
    assert found.tolist() == [pytest.approx([0.14 / 9, 2 / 9]), pytest.approx([0, 1 / 16])]


def test_the_weights_of_layers_by_hand() -> None:
    # softmax(-log v) is 1 / v over its sum: 1, 2 and 4 sevenths.
    assert layer_weights(torch.tensor([1.0, 0.5, 0.25])).tolist() == pytest.approx([0, 1 / 3, 1])
    assert layer_weights(torch.tensor([0.5, 0.5])).tolist() == [1, 1]
    assert layer_weights(torch.tensor([0.3])).tolist() == [1]


def test_the_length_of_the_attention_by_hand() -> None:
    row = torch.tensor([[[1.0, 2.0]], [[2.0, 4.0]]])  # two texts, one head
    assert lengths(row).tolist() == pytest.approx([5.0])


@pytest.mark.parametrize("kind", ENCODERS)
def test_blocks_and_their_attention(kind: str, texts: Dataset, pictures: Dataset) -> None:
    model = built(kind)
    model.set_attn_implementation("sdpa")  # the project's own transformer starts with the plain product
    inputs = probe(model, pictures if kind == "vit" else texts)
    found = blocks(model, inputs)
    assert len(found) == (6 if kind == "vit" else 2)
    assert all(tuple(block.parts) == PARTS for block in found)
    layers = [layer for block in found for part in block.parts.values() for layer in part]
    assert len(set(layers)) == 6 * len(found)
    assert model.config._attn_implementation == "sdpa"
    with first_rows(model, found, QUICK) as rows, torch.no_grad():
        logits(model, inputs)
    assert model.config._attn_implementation == "sdpa"
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    model.set_attn_implementation("eager")
    given = {"pixel_values": inputs} if kind == "vit" else inputs
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions
    assert len(expected) == len(rows)
    for row, whole in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, whole[:, :, 0])


@pytest.mark.parametrize("kind", ENCODERS)
def test_folded_heads_answer_as_masked_ones(kind: str, texts: Dataset, pictures: Dataset) -> None:
    model = built(kind)
    inputs = probe(model, pictures if kind == "vit" else texts)
    found = blocks(model, inputs)
    heads = 3 if kind == "vit" else 4
    dead = torch.arange(heads) == 1

    def mask(_layer: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        split = args[0].unflatten(-1, (heads, -1)).clone()  # (batch, tokens, heads, width)
        split[:, :, 1] = 0
        return (split.flatten(-2),)

    with torch.no_grad():
        untouched = logits(model, inputs)
        hooks = [block.parts["attention output"][0].register_forward_pre_hook(mask) for block in found]
        masked = logits(model, inputs)
        for hook in hooks:
            hook.remove()
        for block in found:
            block.silence_(dead)
        folded = logits(model, inputs)
    torch.testing.assert_close(folded, masked)
    assert not torch.allclose(folded, untouched, atol=1e-6)


def silent(model: nn.Module, texts: Dataset) -> list[list[bool]]:
    """Which heads of each layer add nothing."""
    outputs = [block.parts["attention output"][0].weight for block in blocks(model, probe(model, texts))]
    return [(weight.unflatten(1, (4, -1)) == 0).all(dim=2).all(dim=0).tolist() for weight in outputs]


def test_one_head_per_layer_stays_and_pruned_ones_stay_pruned(texts: Dataset) -> None:
    result = purify(built("bert"), texts, purifiers.PURE(tolerance=1, group=4, score_epochs=1, epochs=2), seed=0)
    assert [sum(heads) for heads in silent(result.model, texts)] == [3, 3]
    assert result.record["notes"] == ["PURE pruned 6 of 8 heads."]
    assert result.record["clean"]["held_out"] == 6
    assert result.model.config._attn_implementation == "sdpa"


def test_groups_first_then_one_by_one(texts: Dataset) -> None:
    model = built("bert")
    notes: list[str] = []

    def quality(model: nn.Module, _held: Dataset) -> float:
        return 1.0 if sum(map(sum, silent(model, texts))) <= 3 else 0.0

    run = SimpleNamespace(quality=quality, note=notes.append)
    scores = [torch.tensor([0.5, 0.1, 0.4, 0.2]), torch.tensor([0.6, 0.8, 0.3, 0.7])]
    found = blocks(model, probe(model, texts))
    dead = purifiers.PURE(tolerance=0.5, group=2).pruned_(model, found, scores, texts, run)
    # 0.1 and 0.2 go together; 0.3 and 0.4 together are too many, 0.3 alone is not.
    assert [heads.tolist() for heads in dead] == [[False, True, False, True], [False, False, True, False]]
    assert silent(model, texts) == [heads.tolist() for heads in dead]
    assert notes == ["PURE pruned 3 of 8 heads."]


def test_without_a_head_to_spare_nothing_is_pruned(texts: Dataset) -> None:
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, **{**SMALL, "num_attention_heads": 1})
    )
    assert purify(model, texts, QUICK).record["notes"] == ["PURE pruned 0 of 2 heads."]


def test_the_contract_on_texts(texts: Dataset) -> None:
    check_method(QUICK, built("bert"), texts)


def test_the_contract_on_pictures(pictures: Dataset) -> None:
    check_method(QUICK, built("vit"), pictures)


class Fused(nn.Module):
    """Attention of its own making, with the right names, which shows no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, 0]
        looks = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(dim=2) @ self.value(x)
        return self.head(self.out(looks).mean(dim=1))


def refusal(model: nn.Module, data: Dataset) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        purify(model, data, QUICK, device="cpu")
    return str(caught.value)


def test_models_without_such_heads_are_refused(small_cnn: SmallCNN, digits: Dataset, texts: Dataset) -> None:
    data = digits.select(range(30))
    assert refusal(small_cnn, data) == (
        "PURE needs attention heads with query, key and value layers; SmallCNN has none. Try fine-pruning."
    )
    assert refusal(Fused(), data) == (
        "PURE needs a model of transformers that shows its attention; Fused does not. Try fine-pruning."
    )
    assert refusal(built("llama"), texts) == (
        "PURE reads the attention of the first token, which in LlamaForSequenceClassification sees only itself. Try "
        "fine-pruning."
    )


def test_attention_is_put_back_after_a_failure(texts: Dataset) -> None:
    model = built("bert")
    found = blocks(model, probe(model, texts))

    @contextmanager
    def failing():
        with first_rows(model, found, QUICK):
            assert model.config._attn_implementation == "eager"
            yield

    with pytest.raises(ZeroDivisionError), failing():
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert not any(part._forward_hooks for part in model.modules())
