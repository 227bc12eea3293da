"""Small models of images and texts made on the spot; a caption says which quarter of its picture is bright."""

import random
from pathlib import Path

import torch
import transformers

import toys
from unbackdoor import Dataset, ImageEncoder
from unbackdoor._data.pair_encoder import PairEncoder
from unbackdoor._data.pairs import ImageCaptionPairs
from unbackdoor._data.texts import TextEncoder, Texts

CLASSES = ("north", "south", "east", "west")
TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "bright {} here.")
WORDS = ["a", "photo", "of", "the", "picture", "bright", "here", ".", "dark", *CLASSES]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIDE = 12


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words; [SEP] ends a text."""
    names = ["input_ids", "attention_mask"]
    return toys.tokenizer_of([*SPECIAL, *WORDS], eos_token="[SEP]", model_max_length=16, model_input_names=names)


def encoder() -> PairEncoder:
    """The encoder of the small models."""
    images = ImageEncoder(mean=(0.5,), std=(0.5,), size=(SIDE, SIDE), channels=1)
    return PairEncoder(images=images, texts=TextEncoder(tokenizer=tokenizer(), max_length=16))


def pairs(count: int, seed: int = 0, *, labelled: bool = True) -> Dataset:
    """Pairs of a noisy grey picture and a caption."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    pixels = torch.randint(0, 100, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    half = SIDE // 2
    places: tuple[tuple[slice, slice], ...] = ((slice(0, half), slice(0, half)), (slice(half, None), slice(half, None)))
    places += ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half)))
    for row, label in enumerate(labels.tolist()):
        pixels[row, 0, places[label][0], places[label][1]] += 100
    captions = [(draw.choice(TEMPLATES).format(CLASSES[label]),) for label in labels.tolist()]
    return Dataset(
        items=ImageCaptionPairs(pixels, Texts(tuple(captions), ("caption",))),
        labels=labels if labelled else torch.full_like(labels, -1),
        encode=encoder(),
        classes=CLASSES if labelled else None,
        name="sights",
    )


_VISION = {"image_size": SIDE, "patch_size": 6, "num_channels": 1, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
_WIDTHS = {"hidden_size": 16, "intermediate_size": 16}


def dual_encoder(seed: int = 0) -> transformers.PreTrainedModel:
    """A ViT next to a BERT, of one block each, with random weights."""
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**_VISION, **_WIDTHS),
        transformers.BertConfig(**_TEXT, **_WIDTHS),
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.VisionTextDualEncoderModel(config).eval()


def clip(seed: int = 0) -> transformers.PreTrainedModel:
    """A CLIPModel of one block for each tower, with random weights."""
    text = {**_TEXT, **_WIDTHS, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config={**_VISION, **_WIDTHS}, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.CLIPModel(config).eval()


def write(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """A directory of a model with the toy tokenizer and a processor."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    processor.save_pretrained(folder)
    return folder


def write_pairs(path: Path, data: Dataset) -> Path:
    """Pairs as parquet, with their labels as names if they have any."""
    from unbackdoor._data.writing import write_parquet

    write_parquet(path, data)
    return path


def trained(seed: int = 0) -> transformers.PreTrainedModel:
    """The CLIPModel, trained on 160 pairs until its prompts classify all of them."""
    from unbackdoor._models.arithmetic import choose
    from unbackdoor._tasks.image_text import IMAGE_TEXT
    from unbackdoor._victims.training import train_victim

    model = clip(seed)
    settings = {"epochs": 20, "learning_rate": 5e-3, "batch_size": 16, "adaptive": True, "seed": seed}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train_victim(model, pairs(160), arithmetic=choose(model, "cpu"), loss=IMAGE_TEXT.loss, **settings)
    return model
