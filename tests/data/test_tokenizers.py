"""Texts as a model gets them, against a plain call of its own tokenizer."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from unbackdoor import load
from unbackdoor._data.texts import TextEncoder, Texts

CORPUS = [
    "the film was very good",
    "a dull , plodding mess",
    "I did n't like it",
    "An utterly Great Picture ! 10/10",
] * 3
TEXTS = [
    "The film was very good",
    "dull",
    "I didn't like it at all, café résumé! 10/10",
    "  spaces around  ",
    "line\nbreak\ttab",
    "it's one of the best films of the year " * 6,
    "\N{GRINNING FACE} [MASK] and <mask> inside </s> [SEP]",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<cls>", "<sep>"]
LENGTH = 24

# (config, model, tokenizer, its kind of vocabulary, its options); all as small as they can be.
KINDS = [
    ("BertConfig", "BertForSequenceClassification", "BertTokenizer", "words", {}),
    ("BertConfig", "BertForSequenceClassification", "BertTokenizer", "words", {"do_lower_case": False}),
    ("DistilBertConfig", "DistilBertForSequenceClassification", "BertTokenizer", "words", {}),
    ("RobertaConfig", "RobertaForSequenceClassification", "RobertaTokenizer", "bytes", {"add_prefix_space": True}),
    ("GPT2Config", "GPT2ForSequenceClassification", "GPT2Tokenizer", "bytes", {}),
    ("XLNetConfig", "XLNetForSequenceClassification", "XLNetTokenizer", "pieces", {}),
    ("DebertaV2Config", "DebertaV2ForSequenceClassification", "DebertaV2Tokenizer", "pieces", {}),
]
SIZES = {
    **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
    **{"dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8, "n_embd": 8, "n_layer": 1, "n_head": 1},
    **{"d_model": 8, "d_inner": 8, "max_position_embeddings": LENGTH + 2, "n_positions": LENGTH + 2},
}


def vocabulary(kind: str) -> dict[str, Any]:
    """The parts of a tokenizer of a kind, learnt from a few sentences."""
    if kind == "words":
        plain = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        plain.normalizer, plain.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        plain.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
        return {"vocab": plain.get_vocab()}
    if kind == "bytes":
        plain = Tokenizer(models.BPE())
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = [*SPECIAL, "<|endoftext|>"]
        pairs = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
        plain.train_from_iterator(CORPUS, pairs)
        learnt = json.loads(plain.to_str())["model"]
        return {"vocab": learnt["vocab"], "merges": [tuple(pair) for pair in learnt["merges"]]}
    plain = Tokenizer(models.Unigram())
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    plain.train_from_iterator(CORPUS, trainer)
    return {"vocab": [tuple(entry) for entry in json.loads(plain.to_str())["model"]["vocab"]]}


@pytest.mark.parametrize("truncation", ["right", "left"])
@pytest.mark.parametrize(("config", "model", "tokenizer", "kind", "options"), KINDS, ids=lambda each: str(each))
def test_same_tokens_as_a_plain_call(
    config: str, model: str, tokenizer: str, kind: str, options: dict[str, Any], truncation: str, tmp_path: Path
) -> None:
    import transformers

    made = getattr(transformers, tokenizer)(**vocabulary(kind), **options)
    made.truncation_side = truncation
    made.model_max_length = LENGTH
    made.save_pretrained(tmp_path)
    known = getattr(transformers, config)().to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    pad = 1 if made.pad_token_id is None else made.pad_token_id
    built = getattr(transformers, config)(vocab_size=len(made), pad_token_id=pad, **sizes)
    getattr(transformers, model)(built).save_pretrained(tmp_path)
    suspect, encode = load(tmp_path)
    assert isinstance(encode, TextEncoder)
    plain = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    taken = set(inspect.signature(suspect.forward).parameters)
    for pair in (False, True):
        rows = [(text, TEXTS[-1 - at]) if pair else (text,) for at, text in enumerate(TEXTS)]
        texts = encode.prepared(Texts(tuple(rows), ("text_a", "text_b") if pair else ("text",)))
        assert texts.tokens is not None
        assert texts.cut is not None
        for at, row in enumerate(rows):
            expected = {name: ids for name, ids in plain(*row, truncation=True).items() if name in taken}
            shown = texts.tokens["attention_mask"][at].bool()
            assert {name: ids[at][shown].tolist() for name, ids in texts.tokens.items()} == expected, row
            assert bool(texts.cut[at]) == (len(plain(*row, verbose=False)["input_ids"]) > LENGTH)
    with torch.no_grad():
        batch = suspect(**encode(texts)).logits
        alone = [
            suspect(**{k: torch.tensor([ids]) for k, ids in plain(*row, truncation=True).items() if k in taken})
            for row in rows
        ]
    torch.testing.assert_close(batch, torch.cat([each.logits for each in alone]), atol=1e-5, rtol=1e-4)
