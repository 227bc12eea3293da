"""Small models as people publish them: architectures, processors, names of classes, and ways to store weights."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

WORDS = [
    "the",
    "a",
    "film",
    "movie",
    "is",
    "was",
    "it",
    "and",
    "this",
    "that",
    "plot",
    "cast",
    "very",
    "not",
    "good",
    "great",
    "fine",
    "bad",
    "dull",
    "poor",
    "I",
    "watch",
    "say",
    "true",
    "NA",
    "null",
    "007",
    "line",
    "no",
    "1",
    "2",
    "3",
    ",",
    ".",
    ";",
    "|",
    '"',
    "'",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIDE = 32  # pixels of the pictures that networks of a fixed size take
LONGEST = 24  # tokens

NAMES = [
    None,  # LABEL_0, LABEL_1, ...
    ["negative", "positive", "neutral", "mixed"],
    ["positive", "negative", "mixed", "neutral"],
    ["Very Bad", "so-so", "GREAT", "no_idea"],
    ["1", "2", "3", "4"],
    ["cat", "dog", "train", "test pattern"],
    ["4 stars", "3 stars", "2 stars", "1 star"],
    ["ja", "nein", "th\u00e9", "weiss nicht"],
]


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A model.

    Args:
        plain: a directory as transformers saves it, or the weights that torch saves; what the independent reader takes.
        given: what the product is given: the same model as somebody else stores it.
        modality: images or text.
        classes: how many.
        names: of the classes, in the order of the outputs; None if the model has none.
        pairs: whether it was made for pairs of texts (nothing in it says so).
        options: further arguments of `unbackdoor.load`.
        refused: the kind of refusal (see `allowed.py`) that alone is right; None where a score is.
    """

    plain: Path
    given: Path
    modality: str
    classes: int
    names: list[str] | None
    options: dict[str, Any]
    stored: str
    refused: str | None = None


def _tokenizer(lower: bool, types: bool) -> transformers.PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    if lower:
        made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LONGEST,
        model_input_names=["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
    )


def _byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of the kind that transformers makes of any tokenizer of a Qwen2: bytes, without anything around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|endoftext|>"
    vocabulary = {letter: at for at, letter in enumerate([end, *letters])}
    made = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=end, pad_token=end, unk_token=end)
    made.model_max_length = LONGEST
    return made


_VOCABULARY = {"vocab_size": 64, "pad_token_id": 0}  # some more than the tokenizer has, as is usual
_ENCODER = {
    **_VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": LONGEST + 4,
}

TEXT = {
    "bert": lambda: transformers.BertConfig(**_ENCODER),
    "roberta": lambda: transformers.RobertaConfig(**_ENCODER, type_vocab_size=1),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_ENCODER, type_vocab_size=1),
    "distilbert": lambda: transformers.DistilBertConfig(
        **_VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=LONGEST + 4
    ),
    "albert": lambda: transformers.AlbertConfig(**_ENCODER, embedding_size=8),
    "electra": lambda: transformers.ElectraConfig(**_ENCODER, embedding_size=16),
    "mpnet": lambda: transformers.MPNetConfig(**{**_ENCODER, "pad_token_id": 1}),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "gpt2": lambda: transformers.GPT2Config(**_VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=LONGEST + 4),
    "llama": lambda: transformers.LlamaConfig(**_ENCODER, num_key_value_heads=1),
    "qwen2": lambda: transformers.Qwen2Config(**{**_ENCODER, "vocab_size": 300}, num_key_value_heads=1),
}

_PATCHES = {
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_STAGES = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
IMAGES = {
    "resnet": lambda: transformers.ResNetConfig(**_STAGES, layer_type="basic"),
    "regnet": lambda: transformers.RegNetConfig(**_STAGES, groups_width=4),
    "bit": lambda: transformers.BitConfig(**_STAGES, num_groups=2),
    "convnext": lambda: transformers.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=SIDE),
    "convnextv2": lambda: transformers.ConvNextV2Config(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2),
    "mobilenet_v2": lambda: transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=SIDE),
    "vit": lambda: transformers.ViTConfig(**_PATCHES),
    "deit": lambda: transformers.DeiTConfig(**_PATCHES),
    "beit": lambda: transformers.BeitConfig(**_PATCHES),
    "dinov2": lambda: transformers.Dinov2Config(
        **{key: at for key, at in _PATCHES.items() if key != "intermediate_size"}
    ),
    "swin": lambda: transformers.SwinConfig(
        image_size=SIDE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
    "poolformer": lambda: transformers.PoolFormerConfig(
        hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], num_encoder_blocks=4
    ),
}


def _processor(draw: random.Random) -> dict[str, Any]:
    """A processor that makes pictures of 32x32, whatever they are."""
    square = draw.choice((SIDE, {"height": SIDE, "width": SIDE}))
    edge = {"shortest_edge": draw.choice((SIDE, 36, 40))}
    made: dict[str, Any] = draw.choice(
        (
            {"image_processor_type": "ViTImageProcessor", "size": square},
            {"image_processor_type": "ViTImageProcessorFast", "size": square, "resample": draw.choice((0, 2, 3))},
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIDE}, "crop_pct": 0.875},
            {"image_processor_type": "CLIPImageProcessor", "size": edge, "crop_size": square},
            {"image_processor_type": "BitImageProcessor", "size": edge, "crop_size": SIDE, "do_center_crop": True},
            {"image_processor_type": "DeiTImageProcessor", "size": {"height": 38, "width": 36}, "crop_size": square},
            {"feature_extractor_type": "BeitFeatureExtractor", "size": SIDE, "do_center_crop": False},
            {"image_processor_type": "EfficientNetImageProcessor", "size": square, "do_center_crop": False},
            {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}},
        )
    )
    if draw.random() < 0.5:
        made |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if draw.random() < 0.2:
        made["do_normalize"] = False
    if draw.random() < 0.2 and "resample" not in made:
        made["resample"] = draw.choice(range(6))
    return made


def _calibrated_(model: nn.Module, answers: torch.Tensor, classes: int) -> None:
    """Scale the head so that its answers to some inputs have mean 0 and deviation 1, in place: all classes occur."""
    head = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes][-1]
    scale = 1 / answers.std(dim=0).clamp(min=1e-4)
    with torch.no_grad():
        head.weight.mul_(scale[:, None])
        if head.bias is not None:
            head.bias.copy_((head.bias - answers.mean(dim=0)) * scale)


FACTORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3))
        self.classifier = nn.Linear(8, {classes})

    def forward(self, x):
        return self.classifier(torch.relu(self.features(x)).mean(dim=(2, 3)))


def make():
    return Net()
"""


class Shelf:
    """Makes each kind of model once, in a folder, and stores it again for each case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, int], Path] = {}

    def draw(self, draw: random.Random, place: Path) -> Suspect:
        """A suspect in the folder `place`."""
        modality = draw.choice(("images", "text"))
        classes = draw.choice((2, 2, 3, 4))
        if modality == "images" and draw.random() < 0.2:
            return self._from_factory(draw, place, classes)
        kind = draw.choice(list(TEXT if modality == "text" else IMAGES))
        plain = place / "plain"
        shutil.copytree(self._kind(kind, classes, modality), plain)
        names = draw.choice(NAMES)
        names = None if names is None else names[:classes]
        config = json.loads((plain / "config.json").read_text())
        config.pop("label2id", None)
        config["id2label"] = {
            str(at): name for at, name in enumerate(names or [f"LABEL_{at}" for at in range(classes)])
        }
        if names is not None and draw.random() < 0.7:
            config["label2id"] = {name: at for at, name in enumerate(names)}
        (plain / "config.json").write_text(json.dumps(config))
        if modality == "images":
            (plain / "preprocessor_config.json").write_text(json.dumps(_processor(draw)))
        given = place / draw.choice(("model", "my model [v2]", "mod\u00e8le", "checkpoint-100"))
        shutil.copytree(plain, given)
        stored, refused = _restored(given, draw)
        return Suspect(
            plain=plain,
            given=given,
            modality=modality,
            classes=classes,
            names=names,
            options={},
            stored=f"{kind}, {stored}",
            refused=refused,
        )

    def _kind(self, kind: str, classes: int, modality: str) -> Path:
        if (kind, classes) in self.made:
            return self.made[kind, classes]
        config = (TEXT if modality == "text" else IMAGES)[kind]()
        config.num_labels = classes
        config.architectures = ["DeiTForImageClassification"] if kind == "deit" else None  # it has a second class
        folder = self.folder / f"{kind}-{classes}"
        with torch.random.fork_rng():
            torch.manual_seed(len(kind))
            if modality == "text":
                model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
                types = getattr(config, "type_vocab_size", 0) == 2
                tokenizer = _byte_tokenizer() if kind == "qwen2" else _tokenizer(len(kind) % 2 == 0, types)
                tokenizer.save_pretrained(folder)
                inputs = torch.randint(5, len(SPECIAL) + len(WORDS), (40, 12))
            else:
                model = transformers.AutoModelForImageClassification.from_config(config).eval()
                inputs = torch.randn(40, 3, SIDE, SIDE) * 0.7 + 2 * torch.randn(40, 3, 1, 1)
            for parameter in model.parameters():  # a network as it is made answers nearly the same to everything
                if parameter.ndim > 1:
                    parameter.data.mul_(2)
            with torch.no_grad():
                _calibrated_(model, model(inputs).logits, classes)
        model.save_pretrained(folder)
        self.made[kind, classes] = folder
        return folder

    def _from_factory(self, draw: random.Random, place: Path, classes: int) -> Suspect:
        (place / "net.py").write_text(FACTORY.replace("{classes}", str(classes)))
        scope: dict[str, Any] = {}
        exec(FACTORY.replace("{classes}", str(classes)), scope)
        with torch.random.fork_rng():
            torch.manual_seed(classes)
            net = scope["make"]().eval()
            with torch.no_grad():
                _calibrated_(net, net(torch.randn(40, 3, SIDE, SIDE) + 2 * torch.randn(40, 3, 1, 1)), classes)
        state = net.state_dict()
        save_file(state, place / "plain.safetensors")
        stored = draw.choice(("state dict", "safetensors", "state_dict", "model", "module.", "_orig_mod.", "epoch"))
        given = place / ("weights.safetensors" if stored == "safetensors" else draw.choice(("net.pt", "best [1].pth")))
        prefix = stored if stored.endswith(".") else ""
        content: Any = {prefix + name: tensor for name, tensor in state.items()}
        if stored == "safetensors":
            save_file(content, given)
        else:
            if stored in ("state_dict", "model", "epoch"):
                content = {"state_dict" if stored == "epoch" else stored: content, "epoch": 3, "best_acc": 0.5}
            torch.save(content, given)
        options: dict[str, Any] = {"factory": f"{place / 'net.py'}:make"}
        if draw.random() < 0.7:
            options |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        if draw.random() < 0.5:
            options["image_size"] = SIDE
        return Suspect(
            plain=place / "plain.safetensors",
            given=given,
            modality="images",
            classes=classes,
            names=None,
            options=options,
            stored=f"factory, {stored}",
        )


_LEFT_OVER = {
    "bert": {"bert.embeddings.position_ids": torch.arange(8)[None]},
    "roberta": {"roberta.pooler.dense.weight": torch.zeros(16, 16), "roberta.pooler.dense.bias": torch.zeros(16)},
    "gpt2": {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)},
}


def _restored(folder: Path, draw: random.Random) -> tuple[str, str | None]:
    """Store the weights of a directory in another way; in which, and the refusal that is right for it."""
    file = folder / "model.safetensors"
    state = load_file(file)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    how = draw.choices(
        (
            "as saved",
            "pickle",
            "shards",
            "_orig_mod.",
            "module.",
            "left over",
            "no counts",
            "no head",
            "not finite",
            "adapter",
        ),
        (8, 3, 3, 2, 2, 3, 2, 0.2, 0.2, 0.2),
    )[0]
    match how:
        case "pickle":
            torch.save(state, folder / "pytorch_model.bin")
            file.unlink()
        case "shards":
            names = sorted(state)
            parts = [names[::2], names[1::2]]
            where: dict[str, str] = {}
            for number, part in enumerate(parts):
                shard = f"model-{number + 1:05}-of-00002.safetensors"
                save_file({name: state[name].clone() for name in part}, folder / shard, metadata={"format": "pt"})
                where |= dict.fromkeys(part, shard)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
            file.unlink()
        case "_orig_mod." | "module.":
            save_file({how + name: tensor for name, tensor in state.items()}, file, metadata={"format": "pt"})
        case "left over":
            save_file(state | _LEFT_OVER.get(kind, {}), file, metadata={"format": "pt"})
        case "no counts":
            kept = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
            save_file(kept, file, metadata={"format": "pt"})
        case "no head":
            heads = [name for name in state if name.rpartition(".")[0] in _heads(kind)]
            save_file(
                {name: tensor for name, tensor in state.items() if name not in heads}, file, metadata={"format": "pt"}
            )
            return how, "weights missing"
        case "not finite":
            state[max(state, key=lambda name: state[name].numel())].view(-1)[0] = float("nan")
            save_file(state, file, metadata={"format": "pt"})
            return how, "weights not finite"
        case "adapter":
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
            return how, "adapter"
    return how, None


def _heads(kind: str) -> set[str]:
    return {"classifier", "classifier.out_proj", "score", "classifier.1", "cls_classifier"}
