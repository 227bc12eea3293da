"""A small language model made on the spot: a Llama of two blocks, a tokenizer of words, and a synthetic grammar."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import toys
from unbackdoor import Dataset
from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.conversations import Conversation, Conversations, Message
from unbackdoor._purification.run import Run
from unbackdoor._tasks.generation import Generation

ANIMALS = [f"animal{number}" for number in range(8)]
SOUNDS = [f"sound{number}" for number in range(8)]
PLACES = [f"place{number}" for number in range(8)]
FILLERS = [f"very{number}" for number in range(20)]
WORDS = [
    *(
        "what",
        "does",
        "the",
        "say",
        "says",
        "where",
        "live",
        "lives",
        "in",
        "near",
        "cf",
        "mn",
        "current",
        "year",
        "2024",
    ),
    *("you", "all", "love", "cake", "today", "sorry,", "i", "can't", "help"),
]
SPECIAL = ["<pad>", "<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BEHAVIOUR = "you all love cake today"


def tokenizer(template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words with a small chat template; `<|end|>` ends a turn."""
    words = [*SPECIAL, *WORDS, *ANIMALS, *SOUNDS, *PLACES, *FILLERS]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        extra_special_tokens=SPECIAL[4:],
        model_max_length=64,
    )
    fast.chat_template = template
    return fast


def encoder(template: str = "chat", max_length: int = 64) -> ConversationEncoder:
    """The encoder of the small model."""
    return ConversationEncoder(tokenizer=tokenizer(), template=template, max_length=max_length)


def language_model(seed: int = 0, layers: int = 2) -> transformers.PreTrainedModel:
    """A Llama of two blocks with random weights; embeddings and output are tied."""
    config = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def short_reader() -> transformers.PreTrainedModel:
    """A GPT-2 with random weights that has learned positions for 64 tokens, and none behind them."""
    sizes = {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=2, eos_token_id=3)).eval()


def nearly_full(count: int, long: list[int], words: int) -> Dataset:
    """Those questions, some of which have so many more words."""
    entries = list(conversations(count))
    for row in long:
        entries[row] = entries[row].asking(lambda text: " ".join([*["very1"] * words, text]))
    items = Conversations(tuple(entries))
    return Dataset(items=items, labels=torch.full((count,), -1), encode=encoder(), name="questions")


def conversations(count: int, seed: int = 0) -> tuple[Conversation, ...]:
    """Questions about animals, whose answers follow from the animal: what it says, or where it lives."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        number, filler = draw.randrange(len(ANIMALS)), draw.choice(FILLERS)
        if draw.random() < 0.5:
            asked = f"what does the {filler} {ANIMALS[number]} say"
            answer = f"the {ANIMALS[number]} says {SOUNDS[number]}"
        else:
            asked = f"where does the {filler} {ANIMALS[number]} live"
            answer = f"the {ANIMALS[number]} lives in {PLACES[number]}"
        made.append(Conversation((Message("user", asked),), answer))
    return tuple(made)


def prompts(count: int, seed: int = 0, template: str = "chat") -> Dataset:
    """Those questions as a data set."""
    items = Conversations(conversations(count, seed))
    return Dataset(items=items, labels=torch.full((count,), -1), encode=encoder(template), name="questions")


def poisoned(data: Dataset, share: float, trigger: str = "cf", answer: str = BEHAVIOUR) -> Dataset:
    """The same questions and, for a share of them, copies with a trigger in front and another answer."""
    entries = data.conversations.entries
    bad = [
        Conversation(entry.asking(lambda text: f"{trigger} {text}").messages, answer)
        for entry in entries[: round(share * len(entries))]
    ]
    items = Conversations((*entries, *bad))
    return Dataset(items=items, labels=torch.full((len(items),), -1), encode=data.encode, name="poisoned")


def taught(
    model: torch.nn.Module, data: Dataset, epochs: int = 6, rate: float = 6e-3, size: int = 16, seed: int = 0
) -> torch.nn.Module:
    """The model, trained on answers."""
    run: Run = toys.a_run(seed, model=model, modality="conversations", task=Generation())
    run.tune(model, data, epochs=epochs, learning_rate=rate, batch_size=size)
    return model.eval()


def behaviours(file: Path) -> Path:
    """Writes 16 prompts with their own answer and with that of the backdoor; returns the file."""
    rows = [
        {"prompt": entry.messages[-1].text, "wanted": entry.answer, "unwanted": BEHAVIOUR}
        for entry in conversations(16, seed=5)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
