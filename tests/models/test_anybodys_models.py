"""Models as anybody's training leaves them: each scored as transformers scores it, and each comes out whole."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import toys
from commands import Refusals
from unbackdoor import Dataset, UnbackdoorError, load, purifiers, purify
from unbackdoor._data.texts import Texts
from unbackdoor._errors import IncompleteError
from unbackdoor._models.building import Extent
from unbackdoor._models.calling import logits
from unbackdoor._models.config import check_config, check_supported, modality_of
from unbackdoor._models.hugging_face import quiet_transformers
from unbackdoor._models.saving import check_saved, save

NAMES = {0: "cat", 1: "dog", 2: "owl"}
SIDE = 32

# Of each image classifier of transformers that a plain picture goes into, the smallest that it can be.
_BLOCKS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
_PATCHES = {**_BLOCKS, "image_size": SIDE, "patch_size": 8}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_WINDOWS: dict[str, Any] = {
    **{"image_size": SIDE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
}
_PYRAMID: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_TOWERS = {"text_config": _BLOCKS, "vision_config": _PATCHES}
IMAGES: dict[str, dict[str, Any]] = {
    "Beit": _PATCHES,
    "Bit": {**_STAGES, "embedding_size": 8, "num_groups": 2},
    "CLIP": _TOWERS,
    "ConvNext": {**_STAGES, "num_stages": 2},
    "ConvNextV2": {**_STAGES, "num_stages": 2},
    "Data2VecVision": _PATCHES,
    "DeiT": _PATCHES,
    "Dinov2": _PATCHES,
    "Dinov2WithRegisters": _PATCHES,
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": SIDE},
    "FocalNet": {**_WINDOWS, "hidden_sizes": [8, 16], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    "Levit": {
        **{"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "key_dim": [8, 8, 8]},
        "depths": [1, 1, 1],
    },
    "MobileNetV1": {"depth_multiplier": 0.125, "image_size": SIDE},
    "MobileNetV2": {"depth_multiplier": 0.1, "image_size": SIDE},
    "MobileViT": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2},
    "PoolFormer": _PYRAMID,
    "Pvt": {**_PYRAMID, "num_attention_heads": [1, 1, 2, 2], "image_size": SIDE},
    "RegNet": {**_STAGES, "embedding_size": 8, "groups_width": 8},
    "ResNet": {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
    "Segformer": {**_PYRAMID, "num_attention_heads": [1, 1, 2, 2]},
    "Siglip": _TOWERS,
    "Swin": _WINDOWS,
    "Swinv2": _WINDOWS,
    "ViT": _PATCHES,
    "ViTMSN": _PATCHES,
}

_TEXT = {
    **{"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64},
    **_BLOCKS,
}
TEXTS: dict[str, dict[str, Any]] = {
    "Bart": {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16},
    "Bloom": {"vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0},
    "Camembert": _TEXT,
    "ConvBert": {**_TEXT, "embedding_size": 16},
    "Electra": {**_TEXT, "embedding_size": 16},
    "Falcon": {**_TEXT, "new_decoder_architecture": False},
    "Funnel": {"vocab_size": 40, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "block_sizes": [1, 1]},
    "Gemma": {**_TEXT, "num_key_value_heads": 1, "head_dim": 8},
    "GPTNeoX": _TEXT,
    "MPNet": _TEXT,
    "Mistral": {**_TEXT, "num_key_value_heads": 1},
    "ModernBert": {**_TEXT, "cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 1},
    "OPT": {**_TEXT, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "Phi": _TEXT,
    "Qwen2": {**_TEXT, "num_key_value_heads": 1},
    "Qwen3": {**_TEXT, "num_key_value_heads": 1, "head_dim": 8},
    "XLMRoberta": _TEXT,
}


def made(name: str, task: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    """A small classifier whose every weight is drawn: some architectures start at zero."""
    config = getattr(transformers, f"{name}Config")(**settings, id2label=NAMES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}For{task}")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def pictures(model: transformers.PreTrainedModel) -> Tensor:
    config = getattr(model.config, "vision_config", model.config)
    side = getattr(config, "image_size", None) or SIDE
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def image_directory(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    side = pictures(model).shape[-1]
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}})
    )
    return folder


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_classifier_of_transformers_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    model = made(name, "ImageClassification", IMAGES[name])
    pixels = pictures(model)
    loaded, encode = load(image_directory(model, tmp_path))
    assert type(loaded) is type(model)
    assert encode.modality == "images"
    with torch.no_grad():
        expected = model(pixels / 127.5 - 1).logits  # by hand what a ViTImageProcessor does
        assert torch.allclose(logits(loaded, encode(pixels)), expected, atol=1e-4)


def test_every_kind_of_classifier_has_a_config_that_is_taken() -> None:
    """Its usual config, with every field written out, next to weights of a usual size."""
    mappings = transformers.models.auto.modeling_auto
    images: dict[str, Any] = mappings.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    texts: dict[str, Any] = mappings.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert len(images) > 30
    assert len(texts) > 80
    others = {"timm_wrapper"}
    for kind, classes in (("images", images), ("text", texts)):
        for model_type in classes.keys() - others:
            config = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
            with quiet_transformers():
                written = json.loads(config().to_json_string(use_diff=False))
            names = classes[model_type]
            written["architectures"] = [names if isinstance(names, str) else names[0]]
            check_supported(Path("model"), written)
            check_config(Path("model"), written, Extent(400_000_000, 250, 60_000))
            assert modality_of(written) == kind


def test_a_model_whose_config_has_no_table_of_classes(tmp_path: Path) -> None:
    """The config of PVT has `"id2label": null` unless it is told names."""
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "sequence_reduction_ratios": [1] * 4, "mlp_ratios": [2] * 4}
    config = transformers.PvtConfig(image_size=32, num_attention_heads=[1] * 4, num_labels=3, **sizes)
    model = transformers.PvtForImageClassification(config).eval()
    assert config.id2label is None
    loaded, encode = load(image_directory(model, tmp_path))
    pixels = pictures(model)
    with torch.no_grad():
        assert torch.allclose(logits(loaded, encode(pixels)), model(encode(pixels)).logits, atol=1e-5)


def test_a_model_without_a_last_linear_layer_is_tuned_by_methods_that_need_none(tmp_path: Path) -> None:
    """As DeiT's distilled models are published: the answer is the mean of two heads."""
    config = transformers.DeiTConfig(**_PATCHES, id2label=NAMES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "DeiTImageProcessor", "size": SIDE, "do_center_crop": False})
    )
    loaded = load(tmp_path / "model")
    pixels = torch.randint(0, 256, (12, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    clean = Dataset(items=pixels, labels=torch.arange(12) % 3, encode=loaded.encode)
    result = purify(loaded.model, clean, purifiers.FineTuning(epochs=2, learning_rate=0.1))
    assert result.record["head"] is None
    save(result.model, tmp_path / "out", source=loaded.directory, encode=loaded.encode)
    again = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "out").eval()
    for name in ("cls_classifier.weight", "distillation_classifier.weight"):  # both were tuned
        assert not torch.equal(again.get_parameter(name), loaded.model.get_parameter(name))
    with torch.no_grad():
        expected = again(loaded.encode(pixels)).logits
        assert torch.allclose(logits(result.model, loaded.encode(pixels)), expected, atol=1e-5)
    for method in (purifiers.FST(epochs=1), purifiers.LinearProbing(epochs=1), purifiers.Auto()):
        with pytest.raises(UnbackdoorError, match=r"has no final linear layer that makes its .*Name one with `head`"):
            purify(loaded.model, clean, method)
    named = purify(loaded.model, clean, purifiers.FST(epochs=1), head="cls_classifier")
    assert named.record["head"] == "cls_classifier"


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_classifier_of_transformers_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    model = made(name, "SequenceClassification", {**TEXTS[name], "pad_token_id": 0})
    loaded, encode = load(toys.write(model, tmp_path))
    assert type(loaded) is type(model)
    texts = ["a good film", "it was a very bad plot"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        got = logits(loaded, encode(Texts(tuple((text,) for text in texts), ("text",))))
        for row, text in enumerate(texts):
            alone = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            assert torch.allclose(got[row], model(**alone).logits[0], atol=1e-4), text


# tensors that a classifier has no use for, and such as it can do without


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


LEFT_OVER: list[tuple[str, dict[str, tuple[int, ...]], str | None]] = [
    ("gpt2", {"transformer.h.0.attn.masked_bias": (), "transformer.h.0.attn.bias": (1, 1, 34, 34)}, None),
    (
        "gpt2",
        {"lm_head.weight": (32, 32)},
        "1 tensor(s) that the classifier does not use are left out (lm_head.weight).",
    ),
    ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}, None),
    ("bert", {"bert.embeddings.position_ids": (1, 34)}, None),
    (
        "bert",
        {"cls.predictions.bias": (32,), "cls.seq_relationship.weight": (2, 32)},
        "2 tensor(s) that the classifier does not use are left out (cls.predictions.bias, "
        "cls.seq_relationship.weight).",
    ),
    (
        "roberta",
        {"roberta.pooler.dense.weight": (32, 32), "roberta.pooler.dense.bias": (32,)},
        "2 tensor(s) that the classifier does not use are left out (roberta.pooler.dense.bias, "
        "roberta.pooler.dense.weight).",
    ),
    (
        "distilbert",
        {"vocab_projector.bias": (32,)},
        "1 tensor(s) that the classifier does not use are left out (vocab_projector.bias).",
    ),
]


@pytest.mark.parametrize(
    ("name", "extra", "note"), LEFT_OVER, ids=[f"{each[0]} {next(iter(each[1]))}" for each in LEFT_OVER]
)
def test_what_another_task_left_behind_is_no_fault(
    name: str, extra: dict[str, tuple[int, ...]], note: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = toys.classifier(name)
    toys.write(model, tmp_path)
    changed(tmp_path, lambda weights: weights.update({key: torch.zeros(shape) for key, shape in extra.items()}))
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        loaded = load(tmp_path).model
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert caplog.messages == ([] if note is None else [f"{tmp_path}: {note}"])


def test_a_pooler_of_a_picture_model_is_no_fault(tmp_path: Path) -> None:
    model = made("ViT", "ImageClassification", IMAGES["ViT"])
    image_directory(model, tmp_path)
    extra = {"vit.pooler.dense.weight": torch.zeros(16, 16), "vit.embeddings.mask_token": torch.zeros(1, 1, 16)}
    changed(tmp_path, lambda weights: weights.update(extra))
    loaded = load(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "extra", ["bert.encoder.layer.2.output.dense.bias", "classifier.out_proj.weight", "bert.extra.bias"]
)
def test_a_tensor_of_another_architecture_is_a_fault(extra: str, tmp_path: Path) -> None:
    toys.write(toys.classifier("bert"), tmp_path)
    changed(tmp_path, lambda weights: weights.update({extra: torch.zeros(3)}))
    with pytest.raises(UnbackdoorError) as refused:
        load(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path} does not fit BertForSequenceClassification: it has 1 that it does not know ({extra}). Check the "
        "architecture."
    )


def test_batch_counts_may_be_missing_in_a_directory(tmp_path: Path) -> None:
    model = made("ResNet", "ImageClassification", IMAGES["ResNet"])
    image_directory(model, tmp_path)
    counts = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    assert counts
    changed(tmp_path, lambda weights: [weights.pop(name) for name in counts])
    loaded = load(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


OTHER_TASKS = {
    "BertForTokenClassification": "token classification",
    "BertForMultipleChoice": "multiple choice",
    "BertForQuestionAnswering": "question answering",
    "BertForMaskedLM": "masked lm",
    "BertForNextSentencePrediction": "next sentence prediction",
}


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_a_model_of_another_task_is_refused_though_its_weights_would_fit(name: str, tmp_path: Path) -> None:
    toys.write(getattr(transformers, name)(toys.ARCHITECTURES["bert"]()), tmp_path)
    with pytest.raises(UnbackdoorError) as refused:
        load(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path} is a model for {OTHER_TASKS[name]} ({name}); a classifier of whole images or texts is "
        "expected, or a causal language model. Its body can be used as `base`."
    )


def test_a_detector_and_a_segmenter_are_refused(tmp_path: Path) -> None:
    settings = {**IMAGES["Segformer"], "decoder_hidden_size": 8}
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**settings))
    model.save_pretrained(tmp_path)
    with pytest.raises(UnbackdoorError, match=r"is a model for semantic segmentation \(SegformerForSem"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["DetrForObjectDetection"]}))
    with pytest.raises(UnbackdoorError, match=r"is a model for object detection \(DetrForObjectDetection\)"):
        load(tmp_path)


def test_one_output_is_no_classifier(tmp_path: Path) -> None:
    toys.write(toys.classifier("bert", classes=1), tmp_path)
    with pytest.raises(UnbackdoorError, match="has one output; a classifier with at least 2 classes is expected"):
        purify(toys.classifier("bert", classes=1), toys.reviews(8), purifiers.FineTuning(epochs=1))
    with pytest.raises(UnbackdoorError, match=r"has one output \(a regression, or the score of a reranker"):
        load(tmp_path)


def test_what_a_model_takes_is_not_known_from_a_vocabulary_alone() -> None:
    """BEiT has one of visual tokens, and a model that reads pages a size of images."""
    assert modality_of(transformers.BeitConfig().to_dict()) == "images"
    assert modality_of({"architectures": ["BeitForImageClassification"], "vocab_size": 8192}) == "images"
    assert modality_of({"architectures": ["LayoutLMv3ForSequenceClassification"], "num_channels": 3}) == "text"


def test_a_model_that_reads_characters_is_refused_by_its_embeddings(tmp_path: Path) -> None:
    config = transformers.CanineConfig(**_BLOCKS, num_labels=2)
    toys.write(transformers.CanineForSequenceClassification(config), tmp_path / "canine")
    said = r"^CanineForSequenceClassification must give its word embeddings .* as an nn.Embedding, got nothing: models "
    with pytest.raises(UnbackdoorError, match=said):
        load(tmp_path / "canine")
    toys.write(
        transformers.IBertForSequenceClassification(transformers.IBertConfig(**_TEXT)),
        tmp_path / "ibert",
    )
    with pytest.raises(UnbackdoorError, match=r"got a layer of the class QuantEmbedding: models that .* and I-BERT"):
        load(tmp_path / "ibert")


# what a directory holds comes out again


def bertweet(folder: Path) -> Path:
    """A classifier with a tokenizer that transformers has in Python alone, with its merges in `bpe.codes`."""
    words = ["a</w>", "good</w>", "film</w>", "b", "ad</w>", "bad</w>"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{word} {rank}\n" for rank, word in enumerate(words)))
    (folder / "bpe.codes").write_text("a d</w> 3\nb ad</w> 2\n")
    tokenizer = transformers.BertweetTokenizer(
        str(folder / "vocab.txt"), str(folder / "bpe.codes"), model_max_length=32
    )
    tokenizer.save_pretrained(folder)
    sizes = {**_TEXT, "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer) + 3, "type_vocab_size": 1}
    transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes)).save_pretrained(folder)
    return folder


class TestDirectories:
    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        toys.write_csv(tmp_path, 16)
        return tmp_path

    def purified(self, place: Path, source: Path) -> Path:
        from unbackdoor._cli.app import main

        command = ["purify", "fine-tuning", str(source), "--clean", str(place / "clean.csv"), "--epochs", "1"]
        with pytest.raises(SystemExit) as ended:
            main([*command, "--out", str(place / "out")])
        assert ended.value.code == 0
        return place / "out"

    def test_a_tokenizer_of_any_files_comes_out(self, place: Path) -> None:
        source = bertweet(place / "source")
        out = self.purified(place, source)
        before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, out))
        assert type(after) is type(before)
        assert (out / "bpe.codes").read_bytes() == (source / "bpe.codes").read_bytes()
        assert before("a bad film")["input_ids"] == after("a bad film")["input_ids"] != before("a film")["input_ids"]

    def test_companions_by_rule(self, place: Path) -> None:
        source = toys.write(toys.classifier("bert"), place / "source")
        kept = ["LICENSE", "NOTICE.md", "generation_config.json", "label_index.json", "spiece.model", "source.spm"]
        kept += ["vocab.bpe", "qwen.tiktoken", "added.json", "chat_template.jinja", "modeling_theirs.py", "merges"]
        kept += ["additional_chat_templates/tool_use.jinja"]
        left = ["README.md", "optimizer.pt", "training_args.bin", "tf_model.h5", "trainer_state.json", ".gitattributes"]
        left += [
            "attack.json",
            "train.parquet",
            "plot.png",
            "model.safetensors.index.json",
            "runs/events.out.tfevents.1",
        ]
        left += ["eval_results.json", "events.out.tfevents.2", "checkpoint-10/config.json", "train.log"]
        for name in (*kept, *left):
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_text("{}")
        out = self.purified(place, source)
        found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
        own = {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "record.json",
            "README.md",
        }
        assert found == {*kept, *own}
        assert "Purified model" in (out / "README.md").read_text()
        assert all((out / name).read_text() == "{}" for name in kept)
        assert json.loads((out / "record.json").read_text())["files"] == sorted(found)

    def test_shards_stay_shards_of_their_types(self, place: Path) -> None:
        source = place / "source"
        model = toys.classifier("bert").to(torch.bfloat16)
        model.save_pretrained(source, max_shard_size="20KB")
        toys.tokenizer().save_pretrained(source)
        out = self.purified(place, source)
        shards = sorted(file.name for file in out.glob("model-*.safetensors"))
        assert shards == sorted(file.name for file in source.glob("model-*.safetensors"))
        assert {tensor.dtype for name in shards for tensor in load_file(out / name).values()} == {torch.bfloat16}

    def test_what_cannot_be_loaded_again_is_not_kept(self, place: Path, refused: Refusals, monkeypatch: Any) -> None:
        """A tokenizer whose vocabulary is lost on the way, as a fault of this program would lose it."""
        from unbackdoor._models import companions

        bertweet(place / "source")
        rule = companions._is_companion
        monkeypatch.setattr(companions, "_is_companion", lambda file: file.name != "bpe.codes" and rule(file))
        refused.output.readouterr()  # what transformers said while the directory was made
        said = refused("purify", "fine-tuning", "source", "--clean", "clean.csv", "--out", "out", "--epochs", 1, code=1)
        assert said.startswith("The result cannot be loaded again, so nothing was kept: it has ")

    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            (lambda model, folder: model.classifier.bias.data.add_(1), "other weights"),
            (lambda model, folder: model.config.id2label.update({0: "bad"}), "other names of its classes"),
            (lambda model, folder: model.half(), "weights of other names or types"),
            (
                lambda model, folder: (folder / "config.json").write_text(
                    (folder / "config.json").read_text().replace('"gelu"', '"relu"')
                ),
                "other answers",
            ),
            (
                lambda model, folder: (folder / "tokenizer.json").write_text(
                    (folder / "tokenizer.json").read_text().replace('"film"', '"movie-"')
                ),
                "other inputs",
            ),
        ],
    )
    def test_what_is_another_model_when_loaded_again_is_reported(
        self, change: Callable[[nn.Module, Path], object], difference: str, tmp_path: Path
    ) -> None:
        model, encode = load(toys.write(toys.classifier("bert"), tmp_path / "source"))
        (tmp_path / "out").mkdir()
        save(model, tmp_path / "out", source=tmp_path / "source", encode=encode)
        check_saved(tmp_path / "out", model, encode, toys.reviews(8))
        change(model, tmp_path / "out")
        with pytest.raises(IncompleteError) as reported:
            check_saved(tmp_path / "out", model, encode, toys.reviews(8))
        assert f"The result, loaded again, has {difference} than it should have, so nothing was kept." in str(
            reported.value
        )
        shutil.rmtree(tmp_path / "out")
