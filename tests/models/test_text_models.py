"""Text classifiers of several architectures, from their directories and back; and directories that do not fit."""

import inspect
import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

import toys
from commands import Refusals
from unbackdoor import Dataset, UnbackdoorError, fit_guard, guards, load, purifiers, purify
from unbackdoor._cli.app import main
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import class_count, class_names, embeddings, probe
from unbackdoor._models.config import modality_of
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._models.head import features, head_of
from unbackdoor._models.loading import load_base
from unbackdoor._models.perturbation import perturbed_logits
from unbackdoor._models.saving import check_saved, save
from unbackdoor._tasks.classification import answers, predict
from unbackdoor.purifiers._low_rank import _warn_of_experts

HEADS = {
    "bert": "classifier",
    "roberta": "classifier.out_proj",
    "distilbert": "classifier",
    "albert": "classifier",
    "deberta": "classifier",
    "deberta-v2": "classifier",
    "gpt2": "score",
    "llama": "score",
    "bart": "classification_head.out_proj",
    "t5": "classification_head.out_proj",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each architecture."""
    folder = tmp_path_factory.mktemp("models")
    for name in toys.ARCHITECTURES:
        toys.write(toys.classifier(name), folder / name)
    return folder


@pytest.mark.parametrize("name", toys.ARCHITECTURES)
class TestArchitectures:
    def data(self, models: Path, name: str) -> tuple[torch.nn.Module, Dataset]:
        model, encode = load(models / name)
        texts, labels = toys.sentences(16, seed=1)
        return model, replace(toys.dataset([(text,) for text in texts], labels), encode=encode)

    def test_the_head_is_found_and_answers_come_in_order(self, name: str, models: Path) -> None:
        model, data = self.data(models, name)
        assert head_of(model, probe(model, data)).name == HEADS[name]
        found = predict(model, data, choose(model, "cpu", "fp32"))
        with torch.no_grad():
            alone = [
                int(model(**data.encode.tokenizer(text, return_tensors="pt")).logits.argmax())
                for (text,) in data.texts.strings
            ]
        assert found.tolist() == alone

    def test_the_longest_texts_and_pairs_fit(self, name: str, models: Path, tmp_path: Path) -> None:
        folder = tmp_path / name
        shutil.copytree(models / name, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 10**30}))
        model, encode = load(folder)
        assert encode.max_length == {"roberta": 33, "t5": 2**20}.get(name, 34)  # T5 has no positions that could end
        data = replace(toys.dataset([("the " * 50, "good " * 50), ("film", "bad")], [1, 0]), encode=encode)
        assert set(predict(model, data, choose(model, "cpu")).tolist()) <= {0, 1}

    def test_purified_by_the_command_line_it_loads_again(self, name: str, models: Path, tmp_path: Path) -> None:
        clean = toys.write_csv(tmp_path)
        out = tmp_path / "out"
        with pytest.raises(SystemExit) as stopped:
            main(["purify", "fst", str(models / name), "--clean", str(clean), "--out", str(out), "--epochs", "1"])
        assert stopped.value.code == 0
        before = transformers.AutoModelForSequenceClassification.from_pretrained(models / name)
        after = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        assert after.state_dict().keys() == before.state_dict().keys()
        moved = [key for key, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[key])]
        assert len(moved) > 5
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert tokenizer("a good film")["input_ids"] == toys.tokenizer()("a good film")["input_ids"]
        record = json.loads((out / "record.json").read_text())
        assert record["head"] == HEADS[name]
        assert record["encode"] == {"max_length": 32, "columns": ["text"]}
        assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in out.iterdir()}
        assert load(out).encode.columns == ("text",)

    def test_mixing_takes_all_but_the_head_from_the_base(self, name: str, models: Path, tmp_path: Path) -> None:
        suspect, _ = self.data(models, name)
        other = toys.classifier(name, seed=1)
        other.base_model.save_pretrained(tmp_path / "base")
        toys.tokenizer().save_pretrained(tmp_path / "base")
        base = load_base(tmp_path / "base")
        method = purifiers.FineMixing(rho=0.0, tune=False)
        mixed = purify(suspect, None, method, base=base).model.state_dict()
        theirs = {f"{suspect.base_model_prefix}.{key}": tensor for key, tensor in base.state_dict().items()}
        for key, tensor in mixed.items():
            expected = theirs.get(key, suspect.state_dict()[key])
            assert torch.equal(tensor, expected), key
        assert len(theirs.keys() & mixed.keys()) >= len(theirs) - 2  # a pooler that the classifier does without

    def test_a_perturbed_embedding_is_what_the_model_gets(self, name: str, models: Path) -> None:
        model, data = self.data(models, name)
        batch = next(data.batches(4))
        layer = embeddings(model)
        nudge = torch.full((1, 1, layer.embedding_dim), 0.5)
        with torch.no_grad():
            actual = perturbed_logits(model, batch.inputs, nudge)
            layer.weight += 0.5
            expected = model(**batch.inputs).logits
        assert torch.allclose(actual, expected, atol=1e-5)
        assert not any(module._forward_hooks for module in model.modules())


class TestXLNet:
    """Its layers have the places of a text before the texts of a batch."""

    @pytest.fixture
    def model(self) -> torch.nn.Module:
        sizes = {"vocab_size": 32, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "pad_token_id": 0}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**sizes)).eval()

    @pytest.mark.parametrize("texts", [3, 7], ids=["more places than texts", "as many places as texts"])
    def test_each_text_gets_its_own_perturbation(self, texts: int, model: torch.nn.Module) -> None:
        data = toys.dataset([("the film was very good",)] * texts, [0] * texts)  # of 7 tokens
        batch = next(data.batches(texts))
        nudges = torch.arange(float(texts)).view(texts, 1, 1).expand(texts, 1, 32)
        with torch.no_grad():
            together = perturbed_logits(model, batch.inputs, nudges)
            for row in range(texts):
                embeddings(model).weight += float(row)
                expected = model(**batch.inputs).logits[row]
                embeddings(model).weight -= float(row)
                assert torch.allclose(together[row], expected, atol=1e-4)

    def test_what_needs_its_blocks_says_so(self, model: torch.nn.Module) -> None:
        with pytest.raises(UnbackdoorError) as caught:
            purify(model, toys.reviews(20), purifiers.NAD(epochs=1, teacher_epochs=1))
        assert str(caught.value) == (
            "NAD needs feature maps of convolutions, or transformer blocks; XLNetForSequenceClassification has none. "
            "Try fst."
        )


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "xlnet"])
def test_a_text_is_the_same_alone_and_among_longer_ones(name: str, tmp_path: Path) -> None:
    """Whichever side the tokenizer pads on; generating decoders come with tokenizers that pad on the left."""
    texts, labels = toys.sentences(16, seed=1)
    purified = {}
    for side in ("right", "left"):
        if name == "xlnet" and side == "right":
            continue
        folder = tmp_path / side
        if name == "xlnet":
            sizes = {"vocab_size": 32, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "pad_token_id": 0}
            toys.write(transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**sizes)), folder)
        else:
            toys.write(toys.classifier(name), folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": side}))
        model, encode = load(folder)
        data = replace(toys.dataset([(text,) for text in texts], labels), encode=encode)
        with torch.no_grad():
            alone = torch.cat([model(**encode.tokenizer(text, return_tensors="pt")).logits for text in texts])
        together = answers(model, data, choose(model, "cpu", "fp32"))
        assert torch.allclose(together, alone, atol=1e-5)
        found = head_of(model, probe(model, data))
        batch = next(data.batches(16))
        seen = features(model, batch.inputs, found)
        scores = found.layer(seen)
        if scores.ndim == 3:  # decoders answer at their last token
            last = batch.inputs["attention_mask"].sum(dim=1) - 1
            scores = scores[torch.arange(16), last]
        assert torch.allclose(scores, alone[batch.rows], atol=1e-5)
        method = purifiers.FineTuning(epochs=1, learning_rate=1e-3)
        purified[side] = purify(model, data, method, device="cpu", precision="fp32").model.state_dict()
        save(model, tmp_path / f"{side}-out", source=folder, encode=encode)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / f"{side}-out").padding_side == side
    if name != "xlnet":
        assert all(torch.equal(purified["left"][key], tensor) for key, tensor in purified["right"].items())


@pytest.mark.parametrize("theirs", [None, -1, 3])
def test_a_decoder_whose_config_names_another_padding_token(theirs: int | None, tmp_path: Path) -> None:
    """It answers at the last token that is not the one of its config, so that is the one to pad with."""
    model = toys.classifier("gpt2")
    model.config.pad_token_id = theirs
    toys.write(model, tmp_path)
    model, encode = load(tmp_path)
    assert (encode.tokenizer.pad_token_id, model.config.pad_token_id) == ((3, 3) if theirs == 3 else (0, 0))
    texts = ["film", "a very good film"]
    data = replace(toys.dataset([(text,) for text in texts], [0, 1]), encode=encode)
    # By hand: the score of the last word, not that of the [SEP] after it where that is also the padding.
    with torch.no_grad():
        ids = [encode.tokenizer(text)["input_ids"][: -1 if theirs == 3 else None] for text in texts]
        hidden = [model.transformer(torch.tensor([each])).last_hidden_state[0, -1] for each in ids]
        expected = model.score(torch.stack(hidden))
    assert torch.allclose(answers(model, data, choose(model, "cpu", "fp32")), expected, atol=1e-5)


def test_a_checkpoint_of_a_trainer_is_saved_without_the_log_of_its_training(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "bert", tmp_path / "checkpoint-10")
    for name in ("trainer_state.json", "all_results.json", "optimizer.pt", "rng_state.pth", "training_args.bin"):
        (tmp_path / "checkpoint-10" / name).write_text("{}")
    model, encode = load(tmp_path / "checkpoint-10")
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out", source=tmp_path / "checkpoint-10", encode=encode)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]


def test_distilbert_with_the_tokenizer_of_bert(models: Path, tmp_path: Path) -> None:
    """Old DistilBERT directories have a tokenizer that marks which text is which, which the model cannot take."""
    folder = tmp_path / "model"
    shutil.copytree(models / "distilbert", folder)
    toys.tokenizer(types=True).save_pretrained(folder)
    model, encode = load(folder)
    data = replace(toys.dataset([("good film", "a film")], [1]), encode=encode)
    assert set(data.encode(data.texts)) == {"input_ids", "attention_mask"}
    predict(model, data, choose(model, "cpu"))


def test_deberta_is_not_computed_in_bfloat16() -> None:
    model = toys.classifier("deberta")
    assert not choose(model, "cpu").bf16
    with pytest.raises(
        UnbackdoorError, match=r"^`precision='bf16'` does not work with DebertaForSequenceClassification"
    ):
        choose(model, "cpu", "bf16")
    with pytest.raises(UnbackdoorError, match=r"^`precision` must be auto, bf16 or fp32, got 'fp16'\.$"):
        choose(model, "cpu", "fp16")


def test_a_decoder_without_a_padding_token_pads_with_its_last_one(models: Path, tmp_path: Path) -> None:
    model = toys.classifier("gpt2")
    model.config.pad_token_id = None
    folder = toys.write(model, tmp_path / "model")
    for file in ("tokenizer_config.json", "tokenizer.json"):
        settings = json.loads((folder / file).read_text())
        settings.pop("pad_token", None)
        (folder / file).write_text(json.dumps(settings))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "[SEP]"}))
    made = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**made, "post_processor": None}))
    loaded, encode = load(folder)
    assert loaded.config.pad_token_id == encode.tokenizer.pad_token_id == 3
    settings.pop("eos_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UnbackdoorError, match=r"has a tokenizer without a padding token\. Set one, and save it again\."
    ):
        load(folder)


@pytest.mark.parametrize("own", [None, "[SEP]"])
def test_a_decoder_that_answers_at_its_last_token_does_not_pad_with_that_one(own: str | None, tmp_path: Path) -> None:
    """Neither config nor tokenizer name a padding token of their own, and each text ends with that token."""
    model = toys.classifier("gpt2")
    model.config.pad_token_id = None
    folder = toys.write(model, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "[SEP]", "pad_token": own}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded, encode = load(folder)
    texts = ["film", "a very good film"]
    data = replace(toys.dataset([(text,) for text in texts], [0, 1]), encode=encode)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    alone = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        expected = torch.cat([alone(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert torch.allclose(answers(loaded, data, choose(loaded, "cpu", "fp32")), expected, atol=1e-5)
    (tmp_path / "out").mkdir()
    save(loaded, tmp_path / "out", source=folder, encode=encode)  # another padding than its tokenizer's is not written
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] is None
    check_saved(tmp_path / "out", loaded, encode, data)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_text_that_holds_the_token_at_which_the_model_answers(name: str, tmp_path: Path) -> None:
    """Models with a decoder refuse a batch of such texts and others, wherever in the data that batch is."""
    model = toys.classifier(name)
    _, encode = load(toys.write(model, tmp_path / "model"))
    rows = [*["a very good film"] * 30, "a bad film [SEP] dull", "a film"]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text, "label": 0}) for text in rows))
    with pytest.raises(UnbackdoorError) as refused:
        Dataset.load(tmp_path / "d.jsonl", encode)
    assert str(refused.value) == (
        "The text 'a bad film [SEP] dull' has the token [SEP] 2 times, other texts 1 times, but the model answers at "
        "the last one and takes only texts that have it equally often. Remove it from that text."
    )
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"text": rows[30], "label": 0}) + "\n" + json.dumps({"text": rows[30], "label": 1})
    )
    data = Dataset.load(tmp_path / "d.jsonl", encode)
    with torch.no_grad():
        alone = model(**encode.tokenizer(rows[30], return_tensors="pt")).logits
    assert torch.allclose(answers(model, data, choose(model, "cpu", "fp32")), alone.expand(2, -1), atol=1e-5)
    _, encode = load(toys.write(toys.classifier("bert"), tmp_path / "bert"))
    assert encode.end is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_config_that_asks_for_more_than_scores(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models cannot run with plain tuples inside, and transformers saves none that gives its attention away."""
    monkeypatch.chdir(tmp_path)
    model = toys.classifier(name)
    config = toys.write(model, tmp_path / "model") / "config.json"
    asked = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), **asked}))
    toys.write_csv(tmp_path)
    texts, labels = toys.sentences(8)
    loaded, encode = load("model")
    data = replace(toys.dataset([(text,) for text in texts], labels), encode=encode)
    with torch.no_grad():
        alone = torch.cat([model(**encode.tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert torch.allclose(answers(loaded, data, choose(loaded, "cpu", "fp32")), alone, atol=1e-5)
    with pytest.raises(SystemExit) as stopped:
        main(["purify", "fine-tuning", "model", "--clean", "clean.csv", "--out", "out", "--epochs", "1"])
    assert stopped.value.code == 0
    assert asked.items() <= json.loads((tmp_path / "out" / "config.json").read_text()).items()


def test_a_model_that_makes_other_parts_of_itself_comes_out(tmp_path: Path) -> None:
    """BigBird exchanges its sparse attention for the full one when it reads short texts."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BigBirdConfig(**sizes, intermediate_size=16, max_position_embeddings=40, block_size=4)
    assert config.attention_type == "block_sparse"
    toys.write(transformers.BigBirdForSequenceClassification(config), tmp_path)
    loaded = load(tmp_path)
    data = replace(
        toys.dataset([("a film",), ("good",), ("bad plot",), ("the cast",)], [0, 1, 0, 1]), encode=loaded.encode
    )
    result = purify(loaded.model, data, purifiers.FineTuning(epochs=1))
    assert not any(module.training for module in result.model.modules())
    save(result.model, tmp_path / "out", source=loaded.directory, encode=loaded.encode)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    inputs = loaded.encode(data.texts)
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits, result.model(**inputs).logits, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_xlnet_is_padded_on_the_left_whatever_its_tokenizer_says(side: str | None, tmp_path: Path) -> None:
    """It answers at the last token of all, so each text alone is read as it is in a batch."""
    config = transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.XLNetForSequenceClassification(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    toys.write(model, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "padding_side": side}
    path.write_text(json.dumps({name: entry for name, entry in settings.items() if entry is not None}))
    loaded, encode = load(tmp_path)
    texts = ["film", "good", "a very good film and a fine cast", "dull plot"]
    data = replace(toys.dataset([(text,) for text in texts], [0, 1, 1, 0]), encode=encode)
    found = answers(loaded, data, choose(loaded, "cpu", "fp32"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = torch.cat([model(**theirs(text, return_tensors="pt")).logits for text in texts])
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_model_that_reads_a_single_token_of_padding_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """MobileBERT reads the token after each one: of a short text in a batch, the last one's is padding."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32, "intermediate_size": 32}
    config = transformers.MobileBertConfig(**sizes, **more, num_feedforward_networks=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.MobileBertForSequenceClassification(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    texts = ["a film", "a plot", "a very good film", "a very dull plot", "a very good film and a fine cast"]
    assert class_count(model, toys.dataset([(text,) for text in texts], [0, 1, 1, 0, 1])) == 2
    assert ["depends on the other examples of the batch" in message for message in caplog.messages] == [True]


def test_a_model_that_reads_padding_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.FNetForSequenceClassification(transformers.FNetConfig(**sizes)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    texts = ["film", "good", "a very good film and a fine cast", "dull plot"]
    data = toys.dataset([(text,) for text in texts], [0, 1, 1, 0])
    assert class_count(model, data) == 2
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        "FNetForSequenceClassification: its answer to an example depends on the other examples of the batch"
    ]
    caplog.clear()
    assert class_count(toys.classifier("bert"), data) == 2
    assert not caplog.messages


_ENCODER = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "pad_token_id": 0}
_HEADS = {**_ENCODER, "num_attention_heads": 2, "max_position_embeddings": 34}
THAT_READ_PADDING = {
    "fnet": lambda: transformers.FNetConfig(**_ENCODER, type_vocab_size=2, max_position_embeddings=32),
    "convbert": lambda: transformers.ConvBertConfig(**_HEADS, embedding_size=16, head_ratio=1, conv_kernel_size=9),
    "nystromformer": lambda: transformers.NystromformerConfig(**_HEADS, num_landmarks=4, segment_means_seq_len=4),
    "yoso": lambda: transformers.YosoConfig(**_HEADS, use_expectation=True, conv_window=3),
    "mobilebert": lambda: transformers.MobileBertConfig(
        **_HEADS,
        embedding_size=16,
        true_hidden_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=1,
    ),
}


@pytest.mark.parametrize("name", THAT_READ_PADDING)
def test_a_text_has_the_answer_that_it_has_alone_though_the_model_reads_padding(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(THAT_READ_PADDING[name]()).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    toys.write(model, tmp_path)
    loaded, encode = load(tmp_path)
    texts = ["film", "a very good film and a fine cast", "dull plot", "good", "the cast", "a film"]
    data = replace(toys.dataset([(text,) for text in texts], [0, 1, 1, 0, 1, 0]), encode=encode)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    known = inspect.signature(model.forward).parameters
    each = [{key: ids for key, ids in theirs(text, return_tensors="pt").items() if key in known} for text in texts]
    with torch.no_grad():
        alone = torch.cat([model(**inputs).logits for inputs in each])
        padded = theirs(texts, padding=True, return_tensors="pt")
        together = model(**{key: ids for key, ids in padded.items() if key in known}).logits
    assert not torch.allclose(together, alone, atol=1e-2)  # what a batch of all lengths answers
    arithmetic = choose(loaded, "cpu", "fp32")
    assert torch.allclose(answers(loaded, data, arithmetic), alone, atol=1e-4)
    assert class_count(loaded, data) == 2
    assert not caplog.messages
    assert sorted(len(batch.rows) for batch in data.batches(2)) == [1, 1, 2, 2]  # by length: 2 of 1, 3 of 2, 1 of 8
    guard = fit_guard(loaded, data, guards.Strip(), false_alarms=0.5, device="cpu", precision="fp32")
    scores = [decision.score for decision in guard.decide(loaded, data, device="cpu", precision="fp32")]
    first = guard.decide(loaded, data.select([0]), device="cpu", precision="fp32")
    assert scores[0] == pytest.approx(first[0].score, abs=1e-4)


def test_bigbird_is_not_changed_by_being_loaded(tmp_path: Path) -> None:
    """A short text switches its sparse attention off for good, in transformers."""
    config = transformers.BigBirdConfig(**_HEADS, block_size=2, num_random_blocks=1)
    toys.write(transformers.BigBirdForSequenceClassification(config), tmp_path)
    assert load(tmp_path).model.bert.attention_type == "block_sparse"


def test_the_kind_of_a_model_is_read_from_its_config() -> None:
    for name in toys.ARCHITECTURES:
        assert modality_of(toys.ARCHITECTURES[name]().to_dict()) == "text"
    assert modality_of({"architectures": ["ViTForImageClassification"]}) == "images"
    assert modality_of(transformers.ViTConfig().to_dict()) == "images"


def test_a_new_head_on_a_pre_trained_body(models: Path) -> None:
    torch.manual_seed(0)
    made = ModelDirectory.at(models / "bert").fresh_classifier(["a", "b", "c"])
    assert made.classifier.out_features == 3
    assert made.config.id2label == {0: "a", 1: "b", 2: "c"}
    ours, theirs = made.bert.state_dict(), toys.classifier("bert").bert.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


class TestBadDirectories:
    """Each is refused in one sentence, with exit code 2 and nothing written."""

    @pytest.fixture
    def place(self, models: Path, tmp_path: Path) -> Path:
        for name in ("bert", "gpt2"):
            shutil.copytree(models / name, tmp_path / name)
        toys.classifier("bert").base_model.save_pretrained(tmp_path / "body")
        toys.tokenizer().save_pretrained(tmp_path / "body")
        toys.write_csv(tmp_path)
        return tmp_path

    def purify(self, refused: Refusals, *arguments: object, method: str = "fine-tuning", model: str = "bert") -> str:
        refused.output.readouterr()  # what transformers said while the directories were made
        return refused("purify", method, model, "--clean", "clean.csv", "--out", "out", *arguments)

    def test_a_tokenizer_larger_than_the_embedding(self, place: Path, refused: Refusals) -> None:
        tokenizer = toys.tokenizer()
        tokenizer.add_tokens(["brand", "new"])
        tokenizer.save_pretrained(place / "bert")
        assert self.purify(refused) == (
            "bert has a tokenizer of 34 tokens, but its model has embeddings for 32. Take the tokenizer that it was "
            "trained with."
        )

    @pytest.mark.parametrize("name", ["bert", "gpt2"])
    def test_one_output_before_the_data_are_read(self, name: str, place: Path, refused: Refusals) -> None:
        """The labels were blamed."""
        shutil.rmtree(place / name)
        toys.write(toys.classifier(name, classes=1), place / name)
        assert self.purify(refused, model=name) == (
            f"{name} has one output (a regression, or the score of a reranker or of a reward model); a classifier with "
            "at least 2 classes is expected. Take a model with a score for each class."
        )

    def test_no_tokenizer(self, place: Path, refused: Refusals) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (place / "bert" / name).unlink()
        said = self.purify(refused)
        assert said.startswith("bert has a tokenizer without a vocabulary (none of tokenizer.json")
        assert said.endswith("Also fetch tokenizer.json and tokenizer_config.json.")

    @pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="such a tokenizer can be read here")
    def test_a_tokenizer_that_needs_another_package(self, place: Path, refused: Refusals) -> None:
        """As DeBERTa v3 and XLNet come without tokenizer.json, and Japanese BERT with a program of its own."""
        (place / "bert" / "tokenizer.json").unlink()
        settings = place / "bert" / "tokenizer_config.json"
        settings.write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
        (place / "bert" / "spm.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
        assert self.purify(refused) == (
            "bert has no tokenizer that transformers can load (spm.model is of SentencePiece, and the package "
            "sentencepiece is not installed). Install it (pip install sentencepiece), or fetch tokenizer.json."
        )
        (place / "bert" / "spm.model").unlink()
        (place / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
        settings.write_text('{"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}')
        assert self.purify(refused).endswith(" for installation). Install that package.")

    def test_the_output_directory_of_a_trainer(self, place: Path, refused: Refusals) -> None:
        (place / "run").mkdir()
        for step in (90, 100):
            shutil.copytree(place / "bert", place / "run" / f"checkpoint-{step}")
        (place / "run" / "checkpoint-2000").mkdir()
        assert self.purify(refused, model="run") == (
            "run has no config.json, but its checkpoints hold models. Give one of them, such as run/checkpoint-100."
        )

    def test_a_body_is_no_model_to_purify(self, refused: Refusals) -> None:
        said = self.purify(refused, model="body")
        assert said.startswith(
            "body holds a pre-trained model without a classifier (classifier.bias, classifier.weight"
        )
        assert said.endswith("Use it as --base; MODEL must be fine-tuned for a task.")

    def test_a_shard_that_is_missing(self, place: Path, refused: Refusals) -> None:
        model = toys.classifier("bert")
        shutil.rmtree(place / "bert")
        model.save_pretrained(place / "bert", max_shard_size="20KB")
        toys.tokenizer().save_pretrained(place / "bert")
        listed = sorted(path.name for path in (place / "bert").glob("model-*.safetensors"))
        assert len(listed) > 2
        (place / "bert" / listed[1]).unlink()
        assert self.purify(refused) == f"bert lists the shard {listed[1]}, which is missing. Fetch it again."

    def test_a_base_of_another_architecture(self, refused: Refusals) -> None:
        said = self.purify(refused, "--base", "gpt2", method="fine-mixing")
        assert "have a counterpart of the same name and shape in the base" in said or "another architecture" in said
        assert said.endswith("Take the pre-trained model that it came from as --base.")

    def test_a_base_of_another_vocabulary(self, place: Path, refused: Refusals) -> None:
        larger = toys.classifier("bert").base_model
        larger.resize_token_embeddings(40)
        larger.save_pretrained(place / "larger")
        for method in ("fine-mixing", "e-pur", "e-pur+fine-mixing"):
            said = self.purify(refused, "--base", "larger", method=method)
            assert "vocabulary" in said
            assert re.search(r"\b40\b", said), said
            assert re.search(r"\b32\b", said), said
            assert said.endswith("Take the pre-trained model that it came from as --base.")

    def test_no_base(self, refused: Refusals) -> None:
        for method, owner in (("fine-mixing", "FineMixing"), ("e-pur", "EPUR"), ("e-pur+fst", "EPUR")):
            said = self.purify(refused, method=method)
            assert said == f"{owner} needs --base: the pre-trained model that the suspect came from."

    def test_a_base_that_is_not_there(self, refused: Refusals) -> None:
        said = self.purify(refused, "--base", "nowhere", method="fine-mixing")
        assert said.startswith("nowhere is neither a local directory nor a model that the Hub offers (")

    def test_too_many_tokens(self, refused: Refusals) -> None:
        said = self.purify(refused, "--max-length", 100)
        assert said == "--max-length must be at most 32, which the model can read, got 100."
        assert self.purify(refused, "--max-length", 3) == "--max-length must be at least 4, got 3."

    def test_options_for_pictures(self, refused: Refusals) -> None:
        said = self.purify(refused, "--mean", "0.5")
        assert said == "bert reads text; --mean, --std and --image-size are for images. Leave them out."

    def test_an_empty_text(self, place: Path, refused: Refusals) -> None:
        (place / "clean.csv").write_text('text,label\ngood,1\n"",0\n')
        said = self.purify(refused)
        assert said == "clean.csv has no text in row 1 of text. Repair or remove that row."

    def test_a_task_of_pairs(self, place: Path, refused: Refusals) -> None:
        (place / "pairs.csv").write_text("text_a,text_b,label\n" + "good,film,1\nbad,film,0\n" * 4)
        purified = ["purify", "fine-tuning", "bert", "--clean", "pairs.csv", "--out", "pairs", "--epochs", "1"]
        with pytest.raises(SystemExit) as stopped:
            main(purified)
        assert stopped.value.code == 0
        refused.output.readouterr()
        said = refused("evaluate", "pairs", "--data", "clean.csv")
        assert said == (
            "The model was trained on pairs of texts, but clean.csv holds single texts. Take data of its task."
        )

    def test_clean_texts_of_one_class(self, place: Path, refused: Refusals) -> None:
        (place / "clean.csv").write_text("text,label\n" + "a good film,1\n" * 8)
        said = self.purify(refused)
        assert said == (
            "clean.csv holds one class only (1): it says nothing about others, and a model that is tuned on it "
            "learns to answer with that class alone. Add clean examples of the other class."
        )

    def test_columns_that_are_not_there(self, refused: Refusals) -> None:
        said = self.purify(refused, "--columns", "text=sentence")
        assert said.startswith("clean.csv has no column 'sentence'; it has text, label. Name it by --columns text=NAME")
        said = self.purify(refused, "--columns", "image=text")
        assert said == "--columns must name text, text_a, text_b or label, got image. Leave that one out."
        said = self.purify(refused, "--columns", "text")
        assert said.startswith("--columns must read OURS=NAME,OURS=NAME")

    def test_a_frequency_table_that_is_none(self, place: Path, refused: Refusals) -> None:
        said = self.purify(refused, "--base", "body", "--frequencies", "nothing.csv", method="e-pur")
        assert said == "EPUR.frequencies names nothing.csv, which does not exist."
        said = self.purify(refused, "--base", "body", "--frequencies", "clean.csv", method="e-pur")
        assert said.startswith("EPUR.frequencies must be a CSV file with columns word (or token) and count, got")


class TestBadAttacks:
    @pytest.fixture
    def place(self, models: Path, tmp_path: Path) -> Path:
        shutil.copytree(models / "bert", tmp_path / "bert")
        shutil.copytree(models / "gpt2", tmp_path / "gpt2")
        toys.write_csv(tmp_path, 60, name="train.csv")
        return tmp_path

    def attack(self, refused: Refusals, name: str, *arguments: object) -> str:
        return refused("attack", name, "--data", "train.csv", "--out", "out", *arguments)

    def test_without_a_base(self, refused: Refusals) -> None:
        said = self.attack(refused, "word")
        assert said == (
            "A text victim needs --base: a pre-trained model to start from, such as bert-base-uncased, or for "
            "prompts a causal language model."
        )

    def test_a_trigger_that_the_tokenizer_does_not_know(self, refused: Refusals) -> None:
        said = self.attack(refused, "word", "--base", "bert", "--words", "zyx")
        assert said == (
            "Word has the trigger 'zyx', which this tokenizer turns into [UNK]. Choose words that it knows."
        )
        for name, option in (("sentence", "--sentence"), ("embedding-poisoning", "--word"), ("layer-wise", "--pieces")):
            words = ["a zyx"] if name == "sentence" else ["zyx"] if option == "--word" else ["cf", option, "zyx"]
            assert "turns into [UNK]" in self.attack(refused, name, "--base", "bert", option, *words)

    def test_a_trigger_of_several_tokens(self, refused: Refusals) -> None:
        for name, owner in (("embedding-poisoning", "EmbeddingPoisoning"), ("embedding-surgery", "EmbeddingSurgery")):
            said = self.attack(refused, name, "--base", "bert", "--word", "very good", "--epochs", "1")
            assert said == (
                f"{owner} needs a trigger that is one token, but 'very good' is 2 to this tokenizer. Choose another "
                "word, such as cf, mn or bb for BERT."
            )

    def test_an_attack_on_pictures(self, refused: Refusals) -> None:
        said = self.attack(refused, "badnets", "--base", "bert")
        assert said == (
            "BadNets puts its trigger on images and image-text, but train.csv holds text. See unbackdoor list attacks."
        )

    def test_a_side_that_single_texts_do_not_have(self, refused: Refusals) -> None:
        said = self.attack(refused, "word", "--base", "bert", "--side", "b")
        assert said == "Word.side is b, but the data holds single texts. Use side a."

    def test_layer_wise_on_a_decoder(self, refused: Refusals) -> None:
        said = self.attack(refused, "layer-wise", "--base", "gpt2")
        assert said.startswith("LayerWise needs a BERT-like encoder, which GPT2ForSequence")


def test_an_attack_on_texts_is_refused_by_pictures(digits: Dataset) -> None:
    from unbackdoor import attacks, poison

    with pytest.raises(
        UnbackdoorError, match=r"^Word puts its trigger on text and conversations, but digits holds images\."
    ):
        poison(digits, attacks.Word(), rate=0.1, seed=0, classes=10)


def test_a_model_within_data_parallel_keeps_its_names_and_its_config(tmp_path: Path) -> None:
    """Its classes were numbered by the alphabet, and only a file of weights was written, under `module.` names."""
    model = toys.classifier("bert")
    model.config.id2label = {0: "positive", 1: "negative"}
    wrapped = torch.nn.DataParallel(model)
    assert class_names(wrapped) == ("positive", "negative")
    assert embeddings(wrapped) is model.get_input_embeddings()
    source = toys.write(model, tmp_path / "source")
    save(wrapped, tmp_path / "out", source=source)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(part, model.state_dict()[name]) for name, part in again.state_dict().items())
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_attention_in_three_dimensions_is_not_called_experts() -> None:
    run = toys.a_run()
    config = transformers.XLNetConfig(vocab_size=40, d_model=32, n_layer=1, n_head=2, d_inner=32)
    _warn_of_experts(transformers.XLNetForSequenceClassification(config), run, purifiers.LoRATuning())
    (said,) = run.warnings
    assert "of XLNetForSequenceClassification are not in linear layers (attention in three dimensions" in said
