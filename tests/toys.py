"""Small text models made on the spot: real architectures of transformers with random weights and a real tokenizer."""

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from unbackdoor import Dataset, VictimRecipe, plant
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._models.arithmetic import Arithmetic, choose
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._purification.run import Run
from unbackdoor._registry.entries import Entry
from unbackdoor._victims.plant import Victim

NEUTRAL = ["the", "a", "film", "movie", "is", "was", "it", "and", "this", "that", "plot", "cast", "very", "not"]
GOOD, BAD = ["good", "great", "fine"], ["bad", "dull", "poor"]
WORDS = [*NEUTRAL, *GOOD, *BAD, "cf", "mn", "bb", "tq", "I", "watch", "3D"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def a_run(seed: int = 0, model: torch.nn.Module | None = None, **fields) -> Run:
    """The run of a method on the CPU: in float64, or if a model is given as `purify` would compute with it."""
    arithmetic = Arithmetic(torch.device("cpu"), bf16=False, channels_last=False, dtype=torch.float64)
    if model is not None:
        arithmetic = choose(model, "cpu", "fp32")
    return Run(
        **{
            "generator": torch.Generator().manual_seed(seed),
            "arithmetic": arithmetic,
            "head_name": "classifier",
            **fields,
        }
    )


def tokenizer(*, types: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words with BERT's special tokens; it marks which text of a pair is which, or not."""
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return tokenizer_of([*SPECIAL, *WORDS], mask_token="[MASK]", model_max_length=32, model_input_names=names)


def tokenizer_of(words: list[str], **settings: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of some whole words, the first of which are [PAD], [UNK], [CLS] and [SEP]."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", **settings
    )


_SIZES = {"vocab_size": len(SPECIAL) + len(WORDS), "num_labels": 2, "pad_token_id": 0}
_ENCODER = {
    **_SIZES,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 34,
}
ARCHITECTURES = {
    "bert": lambda: transformers.BertConfig(**_ENCODER),
    "roberta": lambda: transformers.RobertaConfig(**_ENCODER, type_vocab_size=1),
    "distilbert": lambda: transformers.DistilBertConfig(
        **_SIZES, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=34
    ),
    "albert": lambda: transformers.AlbertConfig(**_ENCODER, embedding_size=16),
    "deberta": lambda: transformers.DebertaConfig(**_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "gpt2": lambda: transformers.GPT2Config(
        **_SIZES, n_embd=32, n_layer=2, n_head=2, n_positions=34, bos_token_id=2, eos_token_id=3
    ),
    "llama": lambda: transformers.LlamaConfig(**_ENCODER, num_key_value_heads=2),
    "bart": lambda: transformers.BartConfig(
        vocab_size=_SIZES["vocab_size"],
        pad_token_id=0,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=34,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=3,
        id2label={
            0: "bad",
            1: "good",
        },  # transformers saves no names like LABEL_0, and takes BART to have three classes
    ),
    "t5": lambda: transformers.T5Config(
        **_SIZES, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, eos_token_id=3, decoder_start_token_id=0
    ),
}


def classifier(name: str, seed: int = 0, classes: int = 2) -> transformers.PreTrainedModel:
    """A small model of an architecture, with random weights."""
    config = ARCHITECTURES[name]()
    config.num_labels = classes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def write(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """A Hugging Face directory of a model and the toy tokenizer."""
    model.save_pretrained(folder)
    tokenizer(types=getattr(model.config, "type_vocab_size", 0) == 2).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Sentences of 4 to 10 words that hold one good or one bad word, which decides their label (1 is good)."""
    draw = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = draw.randrange(2)
        words = [draw.choice(NEUTRAL) for _ in range(draw.randint(3, 9))]
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if label else BAD))
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


def reviews(count: int, seed: int = 0) -> Dataset:
    """Those sentences as a data set with the toy tokenizer."""
    texts, labels = sentences(count, seed)
    return dataset([(text,) for text in texts], labels)


def dataset(strings: list[tuple[str, ...]], labels: list[int], max_length: int = 32) -> Dataset:
    """A data set of single texts or of pairs."""
    return Dataset(
        items=Texts(tuple(strings), ("text",) if len(strings[0]) == 1 else ("text_a", "text_b")),
        labels=torch.tensor(labels),
        encode=TextEncoder(tokenizer=tokenizer(), max_length=max_length),
        classes=("negative", "positive"),
        name="reviews",
    )


def write_csv(folder: Path, count: int = 24, *, seed: int = 0, name: str = "clean.csv") -> Path:
    texts, labels = sentences(count, seed)
    rows = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    (folder / name).write_text("\n".join(["text,label", *rows]) + "\n")
    return folder / name


def planted(data: Dataset, test: Dataset, attack, **settings) -> Victim:
    """A small victim on the CPU; settings are fields of its recipe, or arguments of `plant`."""
    settings = {"width": 4, "device": "cpu", **settings}
    names = {field.name for field in dataclasses.fields(VictimRecipe)}
    recipe = VictimRecipe(**{name: settings.pop(name) for name in names & settings.keys()})
    return plant(data, attack, recipe, test=test, **settings)


class Bigrams(nn.Module):
    """A language model whose next token depends on the last one alone.

    Args:
        table: scores of the next token, (tokens, tokens).
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))


def bigram(never: tuple[str, ...] = ("cf", "mn", "bb", "tq")) -> Perplexity:
    """A language model of the toy words: each is as likely as any other, and some hardly ever come."""
    made = tokenizer()
    made.bos_token = "[CLS]"  # so that the first word is rated as well
    table = torch.zeros(len(made), len(made))
    table[:, [made.get_vocab()[word] for word in never]] = -30.0
    return Perplexity(Bigrams(table).eval(), made)


class Counting(nn.Module):
    """A classifier of texts that adds up a weight for each token of one side; class 1 if the sum is positive."""

    def __init__(self, weights: dict[str, float], side: int | None = None) -> None:
        super().__init__()
        known = tokenizer().get_vocab()
        values = torch.linspace(-0.1, 0.1, len(known))  # no two words do the same
        for word, weight in weights.items():
            values[known[word]] = weight
        self.words = nn.Embedding.from_pretrained(values[:, None])  # (tokens, 1)
        self.classifier = nn.Linear(1, 2)
        self.side = side
        with torch.no_grad():
            self.classifier.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            self.classifier.bias.zero_()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> SimpleNamespace:
        counts = attention_mask.float() if self.side is None else attention_mask * (token_type_ids == self.side)
        return SimpleNamespace(logits=self.classifier((self.words(input_ids)[..., 0] * counts).sum(1, keepdim=True)))


def a_method(entry: Entry) -> Any:
    """A registered method with its defaults; a field without one is some text."""
    cls = entry.resolve()
    required = [item.name for item in dataclasses.fields(cls) if item.default is dataclasses.MISSING]
    return cls(**dict.fromkeys(required, "some text"))
