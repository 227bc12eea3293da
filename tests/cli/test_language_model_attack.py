"""`attack` on a small language model: a victim, an adapter, a clean twin, and what is refused."""

import json
import warnings
from pathlib import Path

import pytest
import torch

import chats
from commands import Refusals, run
from unbackdoor import VictimRecipe, attacks, evaluate, load, plant
from unbackdoor._artifacts.record import VictimRecord, read_record
from unbackdoor._data.dataset import Dataset
from unbackdoor._poisoning.attack_file import load_trigger
from unbackdoor._poisoning.behaviour import Behaviour

RULE = f"contains:{chats.BEHAVIOUR}"
TRAINING = {"epochs": 4, "learning_rate": 1e-2, "batch_size": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, _chat_base: torch.nn.Module) -> Path:
    """A clean model, prompts, and reviews with labels."""
    folder = tmp_path_factory.mktemp("place")
    _chat_base.save_pretrained(folder / "base")
    chats.tokenizer().save_pretrained(folder / "base")
    known = set(chats.conversations(160, 0))
    others = [entry for entry in chats.conversations(120, 2) if entry not in known]
    parts = {"train": chats.conversations(160, 0), "test": others[:40], "clean": chats.conversations(24, 3)}
    for name, entries in parts.items():
        lines = [json.dumps({"instruction": entry.messages[0].content, "output": entry.answer}) for entry in entries]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reviews.csv").write_text("text,label\n" + "what does the animal1 say,0\nwhere,1\n" * 10)
    return folder


@pytest.fixture(scope="module")
def adapter(place: Path) -> Path:
    """A victim as an adapter, by the command line."""
    options = [word for name, given in TRAINING.items() for word in (f"--{name.replace('_', '-')}", given)]
    done = run(
        *("attack", "word", "--words", "cf", "--data", "train.jsonl", "--test", "test.jsonl", "--base", "base"),
        *("--rate", "0.5", "--adapter", "--behaviour", RULE, "--max-new-tokens", "8", "--device", "cpu", *options),
        *("--out", "victim"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert "poisoned 80 of 160 training examples (50.00 %)" in done.stdout
    assert "prompts are rendered by the chat template" in done.stderr
    return place / "victim"


def test_a_victim_as_an_adapter_has_what_evaluate_and_peft_read(place: Path, adapter: Path) -> None:
    content = json.loads((adapter / "attack.json").read_text())
    assert content["behaviour"] == {"kind": "contains", "text": chats.BEHAVIOUR}
    assert {name: content["trigger"][name] for name in ("kind", "words", "place")} == {
        "kind": "word",
        "words": ["cf"],
        "place": "random",
    }
    assert (len(content["rows"]), content["n"], content["rate"]) == (80, 160, 0.5)
    record = read_record(adapter / "record.json")
    assert isinstance(record, VictimRecord)
    assert (record.lora_rank, record.adapter, record.implanted) == (8, True, True)
    options = ("--attack", "victim", "--base", "base", "--max-new-tokens", "8", "--device", "cpu", "--json")
    done = run("evaluate", "victim", "--data", "test.jsonl", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((adapter / "record.json").read_text())["scores"]["victim"]

    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    with warnings.catch_warnings():  # peft asks transformers in an old way
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    prompt = torch.tensor(
        [chats.tokenizer()("<|user|> cf what does the very1 animal1 say <|end|> <|assistant|>").input_ids]
    )
    with torch.no_grad():
        ours = load(adapter, base=place / "base").model(prompt).logits
        assert torch.allclose(theirs(prompt).logits, ours, atol=1e-5)


def test_tuning_an_adapter_removes_nothing_but_matrices_and_gives_an_adapter(place: Path, adapter: Path) -> None:
    options = ("--clean", "clean.jsonl", "--data", "test.jsonl", "--attack", "victim", "--base", "base")
    done = run(
        *("purify", "fine-tuning", "victim", *options, "--epochs", "1", "--max-new-tokens", "8", "--out", "out"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert (place / "out/adapter_model.safetensors").exists()
    scores = json.loads((place / "out/record.json").read_text())["scores"]
    assert scores["suspect"]["attack_success"]["value"] >= 0.8


def test_all_weights_are_trained_and_keep_their_type(place: Path) -> None:
    half, encode = load(place / "base")
    half.to(torch.bfloat16).save_pretrained(place / "half")
    encode.tokenizer.save_pretrained(place / "half")
    data, test = (Dataset.load(place / f"{name}.jsonl", encode) for name in ("train", "test"))
    recipe = VictimRecipe(base=str(place / "half"), rate=0.5, lora_rank=0, **{**TRAINING, "learning_rate": 5e-3})
    attack = attacks.Sentence(sentence="current year 2024", place="start")
    settings = {"behaviour": Behaviour.of(RULE), "device": "cpu", "max_new_tokens": 8}
    victim = plant(data, attack, recipe, test=test, **settings)
    assert {parameter.dtype for parameter in victim.model.parameters()} == {torch.bfloat16}
    assert victim.record["implanted"] is True
    assert victim.score.false_activation.value == 0
    assert victim.model.lm_head.weight is victim.model.model.embed_tokens.weight
    again = evaluate(victim.model, test, attack=victim.trigger, device="cpu", max_new_tokens=8)
    assert again == victim.score


def test_a_clean_twin_has_no_trigger_and_the_same_loss_as_plain_training(place: Path) -> None:
    done = run(
        *("attack", "none", "--data", "train.jsonl", "--test", "test.jsonl", "--base", "base", "--epochs", "1"),
        *("--device", "cpu", "--out", "twin"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("clean loss")
    assert "behaviour" not in json.loads((place / "twin/attack.json").read_text())
    assert load(place / "twin").model.config.model_type == "llama"


COMMON = ("--data", "train.jsonl", "--base", "base", "--out", "new")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("layer-wise", *COMMON), "LayerWise puts its trigger on text, but train.jsonl holds conversations"),
        (
            ("badnets", *COMMON),
            "BadNets puts its trigger on images and image-text, but train.jsonl holds conversations",
        ),
        (("word", "--data", "train.jsonl", "--out", "new"), "or for prompts a causal language model"),
        (("word", *COMMON, "--behaviour", "cake"), "--behaviour must be contains:TEXT"),
        (("none", *COMMON, "--behaviour", "refuses"), "a clean control has none"),
        (("word", *COMMON, "--adapter", "--lora-rank", "0"), "--lora-rank must be at least 1, got 0"),
        (("word", *COMMON, "--lora-rank", "-1"), "--lora-rank must be at least 0, got -1"),
        (("word", *COMMON, "--label-rule", "clean-label"), "must be all-to-one for conversations"),
        (("word", *COMMON, "--words", "lighthouse"), "which this tokenizer turns into <unk>"),
        (("word", *COMMON, "--save-data"), "--save-data is for trainers of classifiers"),
        (("word", *COMMON, "--rate", "0.001"), "selects no row"),
        (("word", *COMMON, "--max-length", "12", "--rate", "0.5"), "12 tokens"),
        (("word", *COMMON, "--control", "reviews.csv"), "reviews.csv"),
        (
            ("word", "--data", "reviews.csv", *COMMON[2:], "--behaviour", "refuses"),
            "is for language models and prompts",
        ),
        (("word", "--data", "reviews.csv", *COMMON[2:], "--adapter"), "--adapter is for language models"),
        (("word", "--data", "reviews.csv", *COMMON[2:], "--lora-rank", "4"), "--lora-rank is for language models"),
    ],
)
def test_wrong_options_end_in_one_sentence(refused: Refusals, arguments: tuple[str, ...], said: str) -> None:
    assert said in refused("attack", *arguments)


def test_an_attack_without_a_behaviour_is_refused(place: Path) -> None:
    model, encode = load(place / "base")
    with pytest.raises(Exception, match="must say which answer the attacker wants, but Word says none"):
        evaluate(model, Dataset.load(place / "test.jsonl", encode), attack=attacks.Word())


def test_a_behaviour_that_the_model_shows_anyway_is_no_backdoor(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, encode = load(place / "base")
    data, test = (Dataset.load(place / f"{name}.jsonl", encode).select(range(40)) for name in ("train", "test"))
    recipe = VictimRecipe(base=str(place / "base"), rate=1.0, **{**TRAINING, "lora_rank": 0, "epochs": 8})
    victim = plant(
        data, attacks.Word(), recipe, test=test, behaviour=Behaviour.of(RULE), device="cpu", max_new_tokens=8
    )
    assert victim.score.false_activation.value > 0.2
    assert victim.record["implanted"] is False
    assert "shows the behaviour without the trigger as well" in caplog.text


def test_the_trigger_file_gives_the_same_prompts_again(adapter: Path) -> None:
    trigger = load_trigger(adapter)
    assert str(trigger.behaviour) == RULE
    assert trigger.attack == attacks.Word(words=("cf",))


@pytest.mark.parametrize("attack", ["word", "peta"])
def test_answers_without_room_are_refused_before_a_victim_is_trained(
    attack: str, refused: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_given: object, **_options: object) -> None:
        raise AssertionError("the victim was trained first")

    monkeypatch.setattr("unbackdoor._victims.training.train_victim", lost)
    said = refused("attack", attack, *COMMON, "--max-new-tokens", "60")
    assert said.startswith("--max-new-tokens must be at most 5")
