"""Directories of models of images and texts: loaded as transformers loads them, saved, and refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sights
from unbackdoor import UnbackdoorError, load
from unbackdoor._data.class_prompts import ClassPrompts
from unbackdoor._models.calling import logits
from unbackdoor._models.image_text import check_image_text, image_features, text_features
from unbackdoor._models.saving import check_saved, save

MAKERS = [sights.clip, sights.dual_encoder]


@pytest.mark.parametrize("make", MAKERS, ids=["clip", "dual-encoder"])
def test_a_directory_gives_the_model_of_transformers_and_its_inputs(make, tmp_path: Path) -> None:
    model = make()
    loaded = load(sights.write(model, tmp_path), prompts="one {} more")
    assert type(loaded.model) is type(model)
    own, theirs = model.state_dict(), loaded.model.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert loaded.encode.prompts == ClassPrompts(("one {} more",))
    data = sights.pairs(6)
    inputs, expected = data.encoded_by(loaded.encode).inputs(slice(None)), data.inputs(slice(None))
    assert torch.allclose(inputs.pixels, expected.pixels, atol=1e-6)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("make", MAKERS, ids=["clip", "dual-encoder"])
@torch.no_grad()
def test_scores_are_those_of_transformers_although_each_caption_is_read_once(make) -> None:
    model, inputs = make(), sights.pairs(20).inputs(slice(None))
    assert len(inputs["input_ids"].unique(dim=0)) < 20
    expected = model(**inputs).logits_per_image
    assert torch.allclose(logits(model, inputs), expected, atol=1e-6)
    scale = model.logit_scale.exp()
    images, texts = image_features(model, inputs.pixels), text_features(model, inputs.captions)
    assert torch.allclose(scale * images @ texts.T, expected, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS, ids=["clip", "dual-encoder"])
def test_a_model_is_written_as_it_came(make, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "copy").mkdir()
    loaded = load(sights.write(make(), tmp_path / "source"))
    save(loaded.model, tmp_path / "copy", source=loaded.directory, encode=loaded.encode)
    check_saved(tmp_path / "copy", loaded.model, loaded.encode, sights.pairs(8).encoded_by(loaded.encode))
    assert {"tokenizer.json", "preprocessor_config.json"} <= {file.name for file in (tmp_path / "copy").iterdir()}


def _changed(folder: Path, change) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("vision_config"), "must have vision_config with the fields of that part"),
        (lambda config: config.update(text_config=3), "must have text_config with the fields of that part"),
        (
            lambda config: config["vision_config"].update(auto_map={"AutoModel": "evil.Model"}),
            "asks for Python code of its own in vision_config, which is not run",
        ),
        (lambda config: config["vision_config"].update(hidden_size=32), "does not fit"),
        (lambda config: config["vision_config"].update(patch_size=0), "that transformers can load"),
        (lambda config: config["vision_config"].update(intermediate_size=2**29), "many times larger than the weights"),
        (lambda config: config["vision_config"].update(model_type="resnet"), "many times larger than the weights"),
    ],
    ids=["no-vision", "no-text", "code", "size", "patch", "huge", "no-tower"],
)
def test_a_config_that_does_not_fit_is_refused(change, message: str, tmp_path: Path) -> None:
    folder = _changed(sights.write(sights.dual_encoder(), tmp_path), change)
    with pytest.raises(UnbackdoorError) as problem:
        load(folder)
    assert message in str(problem.value)
    assert "\n" not in str(problem.value)


def test_weights_that_are_missing_or_not_finite_are_refused(tmp_path: Path) -> None:
    folder = sights.write(sights.clip(), tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({name: part for name, part in weights.items() if name != "visual_projection.weight"}, folder / "m.tmp")
    (folder / "m.tmp").rename(folder / "model.safetensors")
    with pytest.raises(UnbackdoorError, match=r"visual_projection\.weight"):
        load(folder)
    weights["logit_scale"] = torch.tensor(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnbackdoorError, match="logit_scale"):
        load(folder)


def test_two_towers_of_another_kind_are_refused(tmp_path: Path) -> None:
    towers = {name: getattr(sights.clip().config, name).to_dict() for name in ("text_config", "vision_config")}
    sizes = {"text_config": towers["text_config"], "vision_config": towers["vision_config"]}
    model = transformers.SiglipModel(transformers.SiglipConfig(**sizes))
    with pytest.raises(UnbackdoorError) as refusal:
        load(sights.write(model, tmp_path / "siglip"))
    assert str(refusal.value) == (
        f"{tmp_path}/siglip has a tower of images and one of texts (siglip); of such models, CLIPModel and "
        "VisionTextDualEncoderModel of transformers are supported. Take one of them."
    )


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_one_tower_alone_is_refused(tower: str, tmp_path: Path) -> None:
    alone = getattr(transformers, f"CLIP{tower.capitalize()}ModelWithProjection")
    alone(getattr(sights.clip().config, f"{tower}_config")).save_pretrained(tmp_path / "alone")
    with pytest.raises(UnbackdoorError) as refusal:
        load(tmp_path / "alone")
    assert str(refusal.value) == (
        f"{tmp_path}/alone is one tower of a model of images and texts (clip_{tower}_model), which answers with no "
        "classes. Give the whole model, or a classifier made from it."
    )


def test_files_of_openclip_are_named_as_that(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 512}}')
    with pytest.raises(UnbackdoorError) as refusal:
        load(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path} is a model of OpenCLIP (open_clip_config.json), which is not read. Give it as a CLIPModel of "
        "transformers, which many of them are to be had as."
    )


def test_options_of_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    folder = sights.write(sights.clip(), tmp_path / "pairs")
    with pytest.raises(UnbackdoorError, match="is not a language model; `template` is for their prompts"):
        load(folder, template="alpaca")
    classifier = transformers.ViTForImageClassification(sights.dual_encoder().config.vision_config)
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(UnbackdoorError, match="is not a model of images and texts; `prompts` are the texts"):
        load(tmp_path / "classifier", mean=(0.5,), std=(0.5,), image_size=12, prompts="a {}")


def test_a_module_that_is_no_such_model_is_refused(small_cnn) -> None:
    with pytest.raises(UnbackdoorError, match="SmallCNN has no vision_model; a model of images and texts"):
        check_image_text(small_cnn, sights.pairs(4))


def test_pairs_that_the_towers_cannot_take_are_refused() -> None:
    import dataclasses

    data = sights.pairs(4)
    wide = dataclasses.replace(data.encode, images=dataclasses.replace(data.encode.images, size=(18, 18)))
    with pytest.raises(UnbackdoorError, match="CLIPModel cannot take the pairs of sights"):
        check_image_text(sights.clip(), dataclasses.replace(data, encode=wide))
