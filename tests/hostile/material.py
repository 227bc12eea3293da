"""The material that the corpus spoils: small models, data and stores that are all in order."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import chats
import commands
import gguf_files
import stores
import toys
from unbackdoor import attacks
from unbackdoor._poisoning.attack_file import save_trigger
from unbackdoor._registry.entries import to_json
from unbackdoor.attacks import REGISTRY

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 2)

    def forward(self, x):
        return self.fc(x.flatten(1))

def make():
    return Net()
"""


def make(folder: Path) -> None:
    """Write everything under a folder."""
    folder.mkdir(parents=True)
    toys.write(toys.classifier("bert"), folder / "text")
    toys.write(toys.classifier("bert").base_model, folder / "base")
    toys.write(toys.classifier("llama"), folder / "decoder")
    _images(folder / "images")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch.nn.Linear(192, 2)
    weights = {f"fc.{name}": tensor.detach() for name, tensor in layer.state_dict().items()}
    (folder / "own").mkdir()
    save_file(weights, folder / "own" / "model.safetensors")
    torch.save(weights, folder / "weights.pt")
    (folder / "factory.py").write_text(FACTORY)
    _data(folder)
    _attack(folder / "word", attacks.Word(target=1), ())
    _attack(folder / "badnets", attacks.BadNets(target=1), (3, 8, 8))
    _store(folder / "store")
    (folder / "grid.toml").write_text(
        '[tasks.texts]\ntrain = "texts.csv"\ntest = "texts.csv"\nheld_out = 4\nbase = "base"\n'
        '[[attacks]]\nname = "word"\nrate = 0.2\n[[methods]]\nname = "fst"\n[[budgets]]\nn = 4\n'
    )


def make_more(folder: Path) -> None:
    """Add language models, and what commands write: an adapter, a guard, a trained model, poisoned examples."""
    chats.language_model(layers=1).save_pretrained(folder / "chat")
    chats.tokenizer().save_pretrained(folder / "chat")
    _adapter(folder / "chat", folder / "adapter")
    entries = chats.conversations(12)
    lines = [json.dumps({"prompt": each.messages[0].content, "response": each.answer}) for each in entries]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    sizes = {"vocab_size": gguf_files.TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gguf_files.write(folder / "model.gguf", transformers.LlamaForCausalLM(config), chats.TEMPLATE)
    small = ("--epochs", "1", "--width", "2", "--batch-size", "4")
    planted = ("--data", "pictures", "--test", "pictures", "--rate", "0.2", "--save-data", *small)
    _command(folder, "attack", "badnets", *planted, "--out", "victim")
    own = ("--isolation-epochs", "1", "--unlearning-epochs", "1", "--isolated", "0.2")
    _command(folder, "train", "abl", "--data", "victim/poisoned.parquet", *own, *small, "--out", "trained")
    share = ("--false-alarms", "0.3", "--copies", "2")
    _command(folder, "guard", "fit", "strip", "images", "--clean", "pictures", *share, "--out", "guard")


def _command(folder: Path, *words: object) -> None:
    done = commands.run(*words, cwd=folder)
    assert done.returncode == 0, done.stderr


def _adapter(base: Path, folder: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for what peft asks it
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(folder)


def _images(folder: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 8},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _data(folder: Path) -> None:
    texts, labels = toys.sentences(16)
    rows = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    for label in (0, 1):
        place = folder / "pictures" / str(label)
        place.mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (8, 8), (40 * number, 200 * label, 10)).save(place / f"{number}.png")
    rows = [f"pictures/{label}/{number}.png,{label}" for label in (0, 1) for number in range(6)]
    (folder / "pictures.csv").write_text("\n".join(["image,label", *rows]) + "\n")


def _attack(folder: Path, attack: Any, shape: tuple[int, ...]) -> None:
    folder.mkdir()
    description = {"format": 1, "attack": to_json(attack, REGISTRY), "rate": 0.1, "seed": 0, "implanted": True}
    save_trigger(folder, description, attack.arrays(shape))


def _store(folder: Path) -> None:
    from unbackdoor._bench import Store

    store = Store(folder)
    store.start()
    for of, attacked in ((stores.victim(), 0.9), (stores.CONTROL, None)):
        store.put(stores.spec(of, "none"), stores.result(0.9, attacked))
        store.put(stores.spec(of, "fst"), stores.result(0.8, None if attacked is None else 0.1))
