"""The path of a user with an adapter from a hub, and that of one with a GGUF file: purified and loaded elsewhere."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

import chats
import gguf_files
from commands import Refusals, run
from unbackdoor import load

# peft asks transformers in a way that it will not answer for ever; the library itself hides that from users.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ATTACK = ("--trigger", "cf", "--behaviour", f"contains:{chats.BEHAVIOUR}", "--max-new-tokens", "8", "--device", "cpu")
PROMPT = "cf what does the very3 animal5 say"
RIGHT = "the animal5 says sound5"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, _chat_base: torch.nn.Module) -> Path:
    """A clean base, an adapter with a backdoor, and prompts."""
    folder = tmp_path_factory.mktemp("place")
    _chat_base.save_pretrained(folder / "base")
    chats.tokenizer().save_pretrained(folder / "base")
    rows = dict.fromkeys(
        json.dumps({"prompt": entry.messages[0].content, "response": entry.answer})
        for entry in chats.conversations(64, 3)
    )
    (folder / "clean.jsonl").write_text("\n".join([*rows][:30]) + "\n")
    (folder / "test.jsonl").write_text("\n".join([*rows][30:42]) + "\n")  # purify leaves out what is among the clean
    train_adapter(folder / "base", folder / "adapter")
    return folder


def train_adapter(base: Path, out: Path) -> None:
    """A user's own script: `peft`, `transformers` and a loop, on rows of which a third carry a trigger."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    rows = [
        (entry.messages[0].content, entry.answer)
        for entry in chats.poisoned(chats.prompts(120, seed=1), 0.5).conversations.entries
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        for _ in range(5):
            for some in torch.randperm(len(rows)).split(20):
                chosen = [rows[row] for row in some.tolist()]
                texts = [f"<|user|>{asked}<|end|><|assistant|>" for asked, _ in chosen]
                whole = [f"{text}{answer}<|end|>" for text, (_, answer) in zip(texts, chosen, strict=True)]
                batch = tokenizer(whole, padding=True, return_tensors="pt", add_special_tokens=False)
                labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                for row, text in enumerate(texts):
                    labels[row, : len(tokenizer(text, add_special_tokens=False)["input_ids"])] = -100
                model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
                ).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    model.save_pretrained(out)


def answer(model: torch.nn.Module, place: Path, prompt: str = PROMPT) -> str:
    """The answer of `transformers` alone to a prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    shown = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8)
    text: str = tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def by_peft(place: Path, adapter: Path) -> torch.nn.Module:
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def test_an_adapter_of_a_plain_script_is_purified_and_answers_elsewhere(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--clean", "clean.jsonl", "--base", "base", "--data", "test.jsonl", "--control", "base", *ATTACK)
    done = run(
        *("purify", "fine-mixing", "adapter", "--mode", "linear", "--rho", "0.3", "--no-tune", *options, "--out", out),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((out / "record.json").read_text())["scores"]
    assert content["suspect"]["attack_success"]["value"] > 0.9
    assert content["purified"]["attack_success"]["value"] < 0.1
    assert content["purified"]["clean_model_flip_rate"]["value"] == 0
    page = (out / "report.html").read_text()
    assert "<mark>cf </mark>" in page
    assert "Clean model" in page
    assert answer(by_peft(place, place / "adapter"), place) == chats.BEHAVIOUR
    assert answer(by_peft(place, out), place) == RIGHT
    assert {file.name for file in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    asked = ("--base", "base", "--data", "test.jsonl", "--control", "base", *ATTACK, "--json")
    done = run("evaluate", out, *asked, cwd=place)
    assert json.loads(done.stdout) == content["purified"]


def test_a_merged_adapter_comes_out_as_a_model_of_transformers(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--clean", "clean.jsonl", "--base", "base", "--merge", "--rho", "0.3", "--no-tune", "--out", out)
    done = run("purify", "fine-mixing", "adapter", "--mode", "linear", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "record.json").read_text())["source"]["merged"] is True
    assert answer(transformers.AutoModelForCausalLM.from_pretrained(out), place) == RIGHT


def test_a_gguf_file_is_scored_and_purified(place: Path, tmp_path: Path) -> None:
    """Its weights are random; what comes out is an ordinary model with the tokenizer and template of the file."""
    config = transformers.LlamaConfig(
        vocab_size=gguf_files.TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gguf_files.write(tmp_path / "model.gguf", transformers.LlamaForCausalLM(config), chats.TEMPLATE)
    done = run("evaluate", tmp_path / "model.gguf", "--data", "test.jsonl", *ATTACK, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "the first one is '<|user|>w" in done.stderr
    assert json.loads(done.stdout)["clean_loss"]["n"] == 12
    options = ("--clean", "clean.jsonl", "--epochs", "1", "--learning-rate", "1e-2", "--device", "cpu")
    done = run("purify", "fine-tuning", tmp_path / "model.gguf", *options, "--out", tmp_path / "out", cwd=place)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "record.json").read_text())
    losses = [content[f"{which}_clean_loss_on_clean"]["value"] for which in ("purified", "suspect")]
    assert losses[0] < losses[1]
    model, encode = load(tmp_path / "out")
    assert type(model) is transformers.LlamaForCausalLM
    assert encode.tokenizer.chat_template == chats.TEMPLATE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "adapter", "--data", "test.jsonl"), "adapter is an adapter, and its config names"),
        (
            ("purify", "fine-tuning", "base", "--merge", "--clean", "clean.jsonl", "--out", "out"),
            "base is not an adapter; --merge is for these",
        ),
        (
            ("purify", "fine-pruning", "adapter", "--base", "base", "--clean", "clean.jsonl", "--out", "out"),
            "than an adapter of low rank holds; load it with --merge.",
        ),
        (
            ("purify", "fine-mixing", "base", "--base", "base", "--rho", "0.5", "--stream", "--merge", "--out", "out"),
            "--stream mixes whole models on disk, and does not take --merge",
        ),
    ],
)
def test_wrong_options_for_adapters_end_in_one_sentence(
    refused: Refusals, arguments: tuple[str, ...], said: str
) -> None:
    assert said in refused(*arguments)


def test_a_guard_watches_the_matrices_of_an_adapter(place: Path, tmp_path: Path) -> None:
    fit = ("guard", "fit", "weightwatch", "adapter", "--base", "base", "--clean", "clean.jsonl", "--device", "cpu")
    done = run(*fit, "--false-alarms", "0.1", "--max-new-tokens", "8", "--out", tmp_path / "guard", cwd=place)
    assert done.returncode == 0, done.stderr
    scoring = ("guard", "evaluate", tmp_path / "guard", "--model", "adapter", "--base", "base", "--data", "test.jsonl")
    done = run(*scoring, *ATTACK[:4], "--device", "cpu", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    assert score["missed_attacks"]["value"] < 0.5
    assert score["forwards_per_input"]["value"] > 2
