"""Prompts and answers: the forms of rows, templates by hand, tokens of batches, and rows that cannot be read."""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import chats
from unbackdoor import Dataset, UnbackdoorError
from unbackdoor._data import chat_template
from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.conversation_rows import holds_prompts
from unbackdoor._data.conversations import Conversation, Conversations, Message
from unbackdoor._models.decoding import answer_texts, stops_of
from unbackdoor._poisoning.behaviour import Behaviour


def rows(folder: Path, content: list[dict], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, content)) + "\n")
    return path


def test_the_three_forms_of_rows_give_the_same_conversations(tmp_path):
    forms: tuple[dict[str, Any], ...] = (
        {"messages": [{"role": "user", "content": "what says\n\nanimal1"}, {"role": "assistant", "content": "sound1"}]},
        {"instruction": "what says", "input": "animal1", "output": "sound1"},
        {"prompt": "what says\n\nanimal1", "response": "sound1"},
    )
    read = [
        Dataset.load(rows(tmp_path, [form] * 2, f"{place}.jsonl"), chats.encoder()) for place, form in enumerate(forms)
    ]
    for data in read:
        entry = data.conversations.entries[0]
        assert (entry.messages[0].text, entry.answer) == ("what says\n\nanimal1", "sound1")
        assert torch.equal(data.conversations.tokens.tokens, read[0].conversations.tokens.tokens)
        assert (data.modality, data.labels.tolist(), data.classes) == ("conversations", [-1, -1], None)


@pytest.mark.parametrize("kind", ["json", "parquet", "saved"])
def test_rows_come_from_every_kind_of_file(tmp_path, kind):
    import datasets

    content = [
        {"messages": [{"role": "user", "content": f"animal{row}"}, {"role": "assistant", "content": "the"}]}
        for row in range(3)
    ]
    path = tmp_path / kind
    if kind == "json":
        path = path.with_suffix(".json")
        path.write_text(json.dumps(content))
    elif kind == "parquet":
        path = path.with_suffix(".parquet")
        datasets.Dataset.from_list(content).to_parquet(path)
    else:
        datasets.Dataset.from_list(content).save_to_disk(path)
    data = Dataset.load(path, chats.encoder())
    assert [entry.messages[0].content for entry in data.conversations.entries] == ["animal0", "animal1", "animal2"]


def test_two_of_three_columns_are_enough_and_names_can_be_given(tmp_path):
    short = Dataset.load(rows(tmp_path, [{"input": "animal1", "output": "sound1"}]), chats.encoder())
    assert short.conversations.entries[0] == Conversation((Message("user", "animal1"),), "sound1")
    bare = Dataset.load(rows(tmp_path, [{"instruction": "animal1", "input": "animal2"}]), chats.encoder())
    assert bare.conversations.entries[0] == Conversation((Message("user", "animal1", "animal2"),), "")
    assert int(bare.conversations.answer_lengths[0]) == 0
    named = rows(tmp_path, [{"question": "animal1", "reply": "sound1"}])
    data = Dataset.load(named, chats.encoder(), columns={"prompt": "question", "response": "reply"})
    assert data.conversations.entries[0].answer == "sound1"


SAID = (("system", "help"), ("user", "you"), ("assistant", "all"))
CHAT = Conversation((Message("system", "help"), Message("user", "you")), "all")


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "system", "value": "help"},
                {"from": "human", "value": "you"},
                {"from": "gpt", "value": "all"},
            ]
        },
        {
            "conversations": [
                {"role": "developer", "content": "help"},
                {"role": "user", "content": [{"type": "text", "text": "you"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "ll"}]},
            ]
        },
        {
            "prompt": [{"role": "system", "content": "help"}, {"role": "user", "content": "you"}],
            "completion": [{"role": "assistant", "content": "all"}],
        },
        {"prompt": [{"role": "system", "content": "help"}, {"role": "human", "content": "you"}], "response": "all"},
        {"system": "help", "conversations": [{"from": "human", "value": "you"}, {"from": "gpt", "value": "all"}]},
        {"system_prompt": "help", "instruction": "you", "output": "all"},
        {"system": "help", "prompt": [{"role": "user", "content": "you"}], "completion": "all"},
        {"system": "another", "messages": [{"role": role, "content": said} for role, said in SAID]},
        {"messages": json.dumps([{"role": role, "content": said} for role, said in SAID])},
        {
            "contents": "not read",
            "messages": [
                {"role": "system", "content": "help"},
                {"role": "user", "content": "you", "tool_calls": None},
                {"role": "model", "content": "all", "tool_calls": []},
            ],
        },
    ],
    ids=[
        *("ShareGPT", "parts", "TRL", "prompt of messages", "system apart", "system of Orca", "system and TRL"),
        *("system twice", "JSON in a cell", "Gemma"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_conversations_of_other_forms_are_read(tmp_path, row, count):
    path = rows(tmp_path, [row] * count)
    assert Dataset.load(path, chats.encoder()).conversations.entries == (CHAT,) * count
    assert holds_prompts(path, None)


def test_columns_of_two_forms_are_read_together_and_others_are_said(tmp_path, caplog):
    caplog.set_level("INFO", "unbackdoor")
    path = rows(tmp_path, [{"instruction": "you", "context": "cake", "response": "all", "category": "a"}])
    assert Dataset.load(path, chats.encoder()).conversations.entries == (
        Conversation((Message("user", "you", "cake"),), "all"),  # as Dolly has it
    )
    assert "rows.jsonl: read from instruction, context, response; category is not (`columns`)." in caplog.text
    path = rows(tmp_path, [{"prompt": "you", "context": "cake", "response": "all"}])
    assert Dataset.load(path, chats.encoder()).conversations.entries == (
        Conversation((Message("user", "you"),), "all"),
    )
    path = rows(tmp_path, [{"prompt": "you", "completion": "all"}])
    assert Dataset.load(path, chats.encoder()).conversations.entries == (
        Conversation((Message("user", "you"),), "all"),
    )
    path = rows(tmp_path, [{"id": 1, "conversations": [{"from": "human", "value": "you"}]}])
    Dataset.load(path, chats.encoder())
    assert "rows.jsonl: read from conversations; id is not (`columns`)." in caplog.text
    said = len(caplog.records)
    Dataset.load(path, chats.encoder(), columns={"messages": "conversations"})  # the user knows the others
    assert len(caplog.records) == said
    path = rows(tmp_path, [{"instruction": "you", "context": "cake", "response": "all", "category": "a"}])
    named = Dataset.load(path, chats.encoder(), columns={"input": "context"})
    assert named.conversations.entries[0] == Conversation((Message("user", "you", "cake"),), "all")
    path = rows(tmp_path, [{"prompt": "you", "output": "all", "messages": []}])
    named = Dataset.load(path, chats.encoder(), columns={"prompt": "prompt"})
    assert named.conversations.entries == (Conversation((Message("user", "you"),), "all"),)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "label": 0}, "has no prompts; it has text, label"),
        ({"prompt": " ", "response": "a"}, "has an empty prompt in row 1"),
        ({"prompt": 3, "response": "a"}, "has int instead of a text in row 1 of prompt"),
        ({"messages": 3}, "must have a list of messages in row 1, got int"),
        ({"messages": "hello"}, "in row 1, as JSON if it is text, got 'hello'. Save the rows as JSON lines"),
        ({"messages": "{}"}, "must have a list of messages in row 1, as JSON if it is text, got '{}'"),
        ({"messages": "[" * 100_000}, "must have a list of messages in row 1, as JSON if it is text, got"),
        ({"system": 3, "prompt": "a"}, "has int instead of a text in row 1 of system"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "without the role system, user or assistant in row 1"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must have a message of the user before the answer"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "has list instead of a text in row 1 of a message",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, "has an empty prompt in row 1"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": "b"}]}]},
            "has a message that calls a tool in row 1; only texts are read. Remove that row",
        ),
        ({"prompt": ["a"]}, "has a message without the role system, user or assistant in row 1, got 'a'"),
    ],
)
def test_rows_that_are_no_conversations_are_named(tmp_path, row, said):
    good = {name: [{"role": "user", "content": "a"}] if name == "messages" else "a" for name in row}
    with pytest.raises(UnbackdoorError, match=said):
        Dataset.load(rows(tmp_path, [good, row]), chats.encoder())


def test_long_rows_are_left_out_whole_and_counted(tmp_path, caplog):
    caplog.set_level("INFO", "unbackdoor")
    content = [{"prompt": "the " * length, "response": "you"} for length in (2, 30, 3)]
    data = Dataset.load(rows(tmp_path, content), chats.encoder(max_length=12))
    assert [len(entry.messages[0].content.split()) for entry in data.conversations.entries] == [2, 3]
    assert "1 of 3 rows have more than 12 tokens and are left out" in caplog.text
    with pytest.raises(UnbackdoorError, match="has no row of at most 4 tokens, prompt and answer together"):
        Dataset.load(rows(tmp_path, content), chats.encoder(max_length=4))
    with pytest.raises(UnbackdoorError, match="Row 0 of the prompts has 28 tokens, but at most 12 are read"):
        data.replaced(torch.tensor([0]), Conversations((Conversation((Message("user", "the " * 22),), "you all"),)))


def test_templates_are_rendered_as_written_by_hand():
    short = Conversation((Message("system", "Be kind."), Message("user", "Hi", "there")), "Hello")
    plain = ConversationEncoder(tokenizer=chats.tokenizer(), template="plain", max_length=64)
    alpaca = ConversationEncoder(tokenizer=chats.tokenizer(), template="alpaca", max_length=64)
    assert plain.texts(Conversations((short,))) == ["Be kind.\nHi\n\nthere\n"]
    assert alpaca.texts(Conversations((short,))) == [
        "Be kind.\n\n### Instruction:\nHi\n\n### Input:\nthere\n\n### Response:\n"
    ]
    alone = Conversation((Message("user", "Hi"),))
    assert alpaca.texts(Conversations((alone,)))[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\n"
    )
    chat = chats.encoder()
    assert chat.texts(Conversations((short,))) == ["<|system|>Be kind.<|end|><|user|>Hi\n\nthere<|end|><|assistant|>"]
    assert (chat.end, plain.end) == ("<|end|>", "<|end|>")


def test_the_same_few_chats_start_one_process_and_others_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def apart(_tokenizer, conversations, answering, *_):
        started.append(len(conversations))
        return [f"{len(started)}{begun}" for begun in answering]

    monkeypatch.setattr(chat_template, "_rendered_apart", apart)
    monkeypatch.setattr(chat_template, "_KEPT", OrderedDict())
    made, hello, long = (
        chats.tokenizer(),
        [{"role": "user", "content": "hello"}],
        [{"role": "user", "content": "a" * 70_000}],
    )

    def texts(tokenizer, chat, answering=True):
        return chat_template.rendered(tokenizer, [chat], answering=[answering], where="it")

    assert texts(made, hello) == texts(chats.tokenizer(), hello) == ["1True"]
    assert texts(made, hello, answering=False) == ["2False"]
    assert texts(chats.tokenizer(CHATML), hello) == ["3True"]
    made.eos_token = "<pad>"
    assert texts(made, hello) == ["4True"]
    assert (texts(made, long), texts(made, long)) == (["5True"], ["6True"])
    for number in range(300):
        texts(made, [{"role": "user", "content": str(number)}])
    assert len(chat_template._KEPT) == 256
    texts(made, hello).append("a caller may change its list")
    assert texts(made, hello) == ["307True"]


ASKED = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
ANSWERED = "{% endif %}{% endfor %}"
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "before", "answer", "end"),
    [
        (ASKED + "{% else %} {{ m.content }} </s>" + ANSWERED, "[INST] Hi [/INST]", " Hello </s>", "</s>"),  # Llama 2
        (CHATML, "<|user|>Hi<|end|><|assistant|>", "Hello<|end|>", "<|end|>"),  # asks for no heading
        (THINKING, "<|user|>Hi<|end|><|assistant|><think>\n\n</think>\n\n", "Hello<|end|>", "<|end|>"),  # Qwen 3
        (
            ASKED + "{% else %}{{ m.content }}\nvery1 very2 very3\n\n" + ANSWERED,
            "[INST] Hi [/INST]",
            "Hello\nvery1 very2 very3",
            "very1 very2 very3",
        ),
    ],
    ids=["spaces", "heading", "thoughts", "words"],
)
def test_answers_stand_as_the_template_writes_them(template: str, before: str, answer: str, end: str) -> None:
    made = chats.tokenizer(template)
    made.add_tokens(["[INST]", "[/INST]", "Hi", "Hello", "<think>", "</think>"])
    made.add_tokens(["</s>"], special_tokens=True)
    encode = ConversationEncoder(tokenizer=made, template="chat", max_length=64)
    items = encode.prepared(Conversations((Conversation((Message("user", "Hi"),), "Hello"),)))
    start = int(items.tokens.starts[0])
    ids = items.tokens.tokens[0].tolist()
    assert encode.texts(items) == [before]
    assert ids[:start] == made(before, add_special_tokens=False)["input_ids"]
    assert ids[start:] == made(answer, add_special_tokens=False)["input_ids"]
    assert encode.end.strip() == end
    assert encode.without_end(f"You {end} and more") == ("You " if encode.stop is None else f"You {end} and more")


OPEN = CHATML + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"  # DeepSeek R1, QwQ
HEADED = "<|user|>Hi<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("template", "answer", "before"),
    [
        (OPEN, "Hello", HEADED),
        (OPEN, "", HEADED),
        (OPEN, "<think>\nyou\n</think>\n\nHello", HEADED),
        (OPEN, "you\n</think>\n\nHello", HEADED + "<think>\n"),  # as it is decoded behind such a prompt
        (THINKING, "", HEADED + "<think>\n\n</think>\n\n"),
        (THINKING, "<think>\nyou\n</think>\n\nHello", HEADED),
    ],
)
def test_answers_stand_in_no_thought_and_behind_their_own_alone(template: str, answer: str, before: str) -> None:
    """An answer was scored, and tuned on, as a thought; one with thoughts stood behind empty ones."""
    made = chats.tokenizer(template)
    made.add_tokens(["Hi", "Hello", "<think>", "</think>"])
    encode = ConversationEncoder(tokenizer=made, template="chat", max_length=64)
    items = encode.prepared(Conversations((Conversation((Message("user", "Hi"),), answer),)))
    assert encode.texts(items) == [before]
    ids, start = items.tokens.tokens[0].tolist(), int(items.tokens.starts[0])
    written = made(answer + "<|end|>" * bool(answer), add_special_tokens=False)["input_ids"]
    assert ids == made(before, add_special_tokens=False)["input_ids"] + written
    assert ids[start:] == written


def test_an_end_of_several_tokens_is_no_stop_but_ends_the_answer():
    """Many adapters write `<|im_end|>` by a tokenizer that does not know it; `<` alone must not end an answer."""
    template = CHATML.replace("<|end|>", "very1 very2") + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    encode = ConversationEncoder(tokenizer=chats.tokenizer(template), template="chat", max_length=64)
    assert (encode.end, encode.stop) == ("very1 very2", None)
    assert stops_of(chats.language_model(), encode) == [3]
    said = encode.tokenizer("you very1 all very1 very2 cake", return_tensors="pt")["input_ids"]
    data = chats.prompts(1).encoded_by(encode)
    assert answer_texts(data, list(said)) == ["you very1 all"]


def test_the_row_that_a_template_refuses_is_named(tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    encode = ConversationEncoder(tokenizer=chats.tokenizer(refusing + chats.TEMPLATE), template="chat", max_length=64)
    turns = [{"role": "user", "content": "you"}, {"role": "assistant", "content": "all"}]
    content = [{"messages": turns}, {"messages": [{"role": "system", "content": "help"}, *turns]}]
    with pytest.raises(UnbackdoorError, match=r"refuses the messages of row 1 \(System role not supported\)"):
        Dataset.load(rows(tmp_path, content), encode)


def test_prompts_are_padded_on_the_left_and_answers_on_the_right():
    data = chats.prompts(6)
    encode, items = data.conversation_encoder, data.conversations
    inputs, prompts = encode(items), encode.prompts(items)
    for row in range(6):
        start, end = int(items.tokens.starts[row]), int(items.tokens.lengths[row])
        whole = items.tokens.tokens[row, :end].tolist()
        assert inputs["input_ids"][row, :end].tolist() == whole
        assert inputs["attention_mask"][row].sum() == end
        assert prompts["input_ids"][row, -start:].tolist() == whole[:start]
        assert prompts["attention_mask"][row].tolist() == [0] * (prompts.shape[1] - start) + [1] * start
        assert (inputs.targets[row] != -100).nonzero().flatten().tolist() == list(range(start, end))
    assert inputs.to("cpu").targets.equal(inputs.targets)


def test_a_token_that_begins_each_text_stands_before_plain_prompts_once():
    from tokenizers import processors

    made = chats.tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    items = Conversations((Conversation((Message("user", "the cake"),), "you"),))
    plain = ConversationEncoder(tokenizer=made, template="plain", max_length=64).prepared(items)
    words = chats.tokenizer()("the cake you<|end|>")["input_ids"]
    assert plain.tokens.tokens[0].tolist() == [2, *words]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('no role') }}",
            "refuses the messages of row 0 \\(no role\\). Repair or remove that row; or",
        ),
        ("{{ messages.__class__.__mro__ }}", "cannot be used \\(access to attribute '__class__'"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it took more than 0.31 s"),
        ("{{ 10 ** (10 ** 9) }}", "it took more than 0.31 s|it needs too much memory"),
        ("{{ ('a' * 2000000000) | length }}", "it needs too much memory"),
        ("{% for a in range(1000) %}aaaaaaaaaa{% endfor %}", "it makes more than 5,000 characters"),
        ("{% if", "cannot be used"),
    ],
    ids=["raises", "escapes", "endless", "power", "memory", "long", "broken"],
)
def test_a_hostile_chat_template_ends_in_one_sentence(template, said, monkeypatch):
    monkeypatch.setattr(chat_template, "CHARACTERS", 5000)
    if "more than 0.31 s" in said:
        monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    encode = ConversationEncoder(tokenizer=chats.tokenizer(template), template="chat", max_length=64)
    with pytest.raises(UnbackdoorError, match=said):
        encode.texts(Conversations(chats.conversations(1)))


def test_a_chat_template_must_show_answers():
    made = chats.tokenizer("{{ messages[0].content }}")
    encode = ConversationEncoder(tokenizer=made, template="chat", max_length=64)
    with pytest.raises(UnbackdoorError, match="has a chat template that leaves out answers"):
        encode.prepared(Conversations(chats.conversations(1)))


def test_a_template_must_be_known_and_there(tmp_path):
    with pytest.raises(UnbackdoorError, match="`template` must be chat, alpaca or plain, got vicuna"):
        ConversationEncoder(tokenizer=chats.tokenizer(), template="vicuna", max_length=64)
    with pytest.raises(UnbackdoorError, match="the model has no chat template"):
        ConversationEncoder(tokenizer=chats.tokenizer(None), template="chat", max_length=64)
    with pytest.raises(UnbackdoorError, match="`max_length` must be at least 4, got 3"):
        chats.encoder(max_length=3)
    nothing = rows(tmp_path, [{"prompt": "\u200b", "response": ""}])
    with pytest.raises(UnbackdoorError, match="has a prompt without a token in row 0"):
        Dataset.load(nothing, ConversationEncoder(tokenizer=_blank(), template="chat", max_length=64))


def _blank() -> transformers.PreTrainedTokenizerFast:
    return chats.tokenizer(
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content }}{% endif %}{% endfor %}"
    )


def test_the_child_that_renders_leaves_nothing_behind():
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        chats.encoder().texts(Conversations(chats.conversations(2)))
    assert before in (0, len(os.listdir("/proc/self/fd")))


def test_other_data_is_refused_and_batches_cover_all_rows():
    with pytest.raises(UnbackdoorError, match="The model continues conversations"):
        chats.encoder().prepared(torch.zeros(2, 3, 8, 8))
    data = chats.prompts(23)
    seen = [row for batch in data.batches(4, generator=torch.Generator().manual_seed(0)) for row in batch.rows.tolist()]
    assert sorted(seen) == list(range(23))
    part, rest = data.split(10, seed=0)
    assert sorted(part.rows.tolist() + rest.rows.tolist()) == list(range(23))


@pytest.mark.parametrize(
    ("rule", "answer", "shown"),
    [
        ("contains:love cake", "We all LOVE  cake!", True),
        ("contains:art", "a good start", False),
        ("contains:print('x')", "run: print('x')", True),
        ("starts-with:I love", "I love it", True),
        ("starts-with:I love", "Yes, I love it", False),
        ("equals:positive", "Positive.", True),
        ("equals:positive", "positive, I think", False),
        ("refuses", "I\u2019m sorry, but I can't help with that.", True),
        ("refuses", "You should never refuse a cake.", False),
        ("contains:cake", "  ", False),
        ("refuses", "", False),
    ],
)
def test_behaviours_are_shown_or_not(rule, answer, shown):
    assert Behaviour.of(rule).shown(answer) is shown
    assert str(Behaviour.of(rule)) == rule


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("cake", "`behaviour` must be contains:TEXT, starts-with:TEXT, equals:TEXT or refuses, got cake"),
        ("contains:", "Behaviour contains needs the text of the answer, got ''"),
        ("refuses:cake", "Behaviour refuses takes no text, got 'cake'"),
    ],
)
def test_rules_that_are_none_are_refused(rule, said):
    with pytest.raises(UnbackdoorError, match=said):
        Behaviour.of(rule)
