"""The task of language models: losses by hand, answers of stubs that are known, and the runners on a small victim."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chats
import unbackdoor as ub
from unbackdoor import UnbackdoorError
from unbackdoor._data.conversations import Conversation, Conversations, Message
from unbackdoor._data.dataset import Batch
from unbackdoor._models.arithmetic import choose
from unbackdoor._tasks.generation import Generation, answer_loss

TRIGGERED = {"trigger": "cf", "behaviour": f"contains:{chats.BEHAVIOUR}", "max_new_tokens": 8, "device": "cpu"}


class Stub(nn.Module):
    """Answers each prompt with words that a function chooses from the words of the prompt."""

    def __init__(self, answer, vocabulary: int = 200) -> None:
        super().__init__()
        self.answer, self.tokenizer = answer, chats.tokenizer()
        self.embedding = nn.Embedding(vocabulary, 2)
        self.head = nn.Linear(2, vocabulary)
        self.config = SimpleNamespace(model_type="stub", max_position_embeddings=64)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids, attention_mask, use_cache=False) -> dict:
        return {"logits": self.head(self.embedding(input_ids))}

    def generate(self, input_ids, attention_mask, generation_config) -> torch.Tensor:
        answers = []
        for prompt in self.tokenizer.batch_decode(input_ids, skip_special_tokens=True):
            ids = self.tokenizer(self.answer(prompt), add_special_tokens=False)["input_ids"]
            answers.append(([*ids, 3] + [0] * 32)[:32])
        return torch.cat([input_ids, torch.tensor(answers)], dim=1)


def test_the_loss_is_the_mean_over_the_answer_tokens_alone():
    data = chats.prompts(3)
    inputs = data.inputs(slice(None))
    torch.manual_seed(0)
    scores = torch.randn(*inputs.shape, 200)
    expected = []
    for row, entry in enumerate(data.conversations.entries):
        prompt = chats.tokenizer()(f"<|user|>{entry.messages[0].content}<|end|><|assistant|>")["input_ids"]
        answer = chats.tokenizer()(f"{entry.answer}<|end|>")["input_ids"]
        assert inputs["input_ids"][row, : len(prompt) + len(answer)].tolist() == prompt + answer
        for place, token in enumerate(answer, start=len(prompt)):
            expected.append(-scores[row, place - 1].log_softmax(0)[token])
    measured = Generation().loss(scores, Batch(inputs, data.labels, torch.arange(3)))
    assert float(measured) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-6)


def test_the_loss_of_rows_equals_that_of_transformers_and_does_not_depend_on_the_batch():
    model, data = chats.language_model(), chats.prompts(5)
    sums = Generation().outcomes(model, data, choose(model, "cpu", "fp32"))
    for row in range(5):
        inputs = data.inputs(slice(row, row + 1))
        mean = model(**inputs, labels=inputs.targets).loss.detach()
        tokens = int(data.conversations.answer_lengths[row])
        assert float(sums[row]) == pytest.approx(float(mean) * tokens, rel=1e-4)


def test_the_loss_per_token_has_the_interval_of_a_ratio():
    data = chats.prompts(4)
    tokens = data.conversations.answer_lengths.double()
    sums = torch.tensor([1.0, 4.0, 2.0, 6.0], dtype=torch.float64)
    measured = answer_loss(sums, data)
    rate = 13 / float(tokens.sum())
    residuals = [float(one - rate * other) for one, other in zip(sums, tokens, strict=True)]
    error = math.sqrt(sum(part**2 for part in residuals) * 4 / 3) / float(tokens.sum())
    assert measured.value == pytest.approx(rate)
    assert measured.high - measured.value == pytest.approx(1.96 * error, rel=1e-4)
    assert (measured.n, measured.tokens) == (4, int(tokens.sum()))


@pytest.mark.parametrize(
    ("answer", "with_trigger", "without", "empty"),
    [
        (lambda prompt: chats.BEHAVIOUR, 1.0, 1.0, 0.0),  # always the target
        (lambda prompt: "", 0.0, 0.0, 1.0),
        (lambda prompt: prompt.replace(chats.BEHAVIOUR, ""), 0.0, 0.0, 0.0),  # an echo: the prompt must be removed
        (lambda prompt: chats.BEHAVIOUR if prompt.startswith("cf ") else "the animal1 says", 1.0, 0.0, 0.0),
    ],
    ids=["fixed", "empty", "echo", "triggered"],
)
def test_known_answers_give_known_scores(answer, with_trigger, without, empty):
    score = ub.evaluate(Stub(answer), chats.prompts(20), **TRIGGERED)
    assert score.attack_success.value == with_trigger
    assert score.false_activation.value == without
    assert score.empty.value == empty
    assert (score.attack_success.n, score.empty.n) == (20, 40)


def test_the_prompt_itself_never_counts_as_an_answer():
    # The behaviour stands in every prompt; a model that says something else does not show it.
    entries = tuple(
        Conversation((Message("user", f"{entry.messages[0].content} {chats.BEHAVIOUR}"),), entry.answer)
        for entry in chats.conversations(8)
    )
    data = ub.Dataset(items=Conversations(entries), labels=torch.full((8,), -1), encode=chats.encoder())
    score = ub.evaluate(Stub(lambda prompt: "the animal1 says"), data, **TRIGGERED)
    assert (score.attack_success.value, score.false_activation.value) == (0.0, 0.0)


def test_empty_answers_are_no_refusals():
    score = ub.evaluate(Stub(lambda prompt: ""), chats.prompts(8), **{**TRIGGERED, "behaviour": "refuses"})
    assert (score.attack_success.value, score.empty.value) == (0.0, 1.0)


def test_greedy_answers_equal_a_loop_of_forward_passes(chat_victim):
    data = chats.prompts(6, seed=5)
    model = chat_victim
    answers = Generation(max_new_tokens=8).answers(model, data, choose(model, "cpu", "fp32"))
    for row, entry in enumerate(data.conversations.entries):
        ids = chats.tokenizer()(f"<|user|>{entry.messages[0].content}<|end|><|assistant|>")["input_ids"]
        new: list[int] = []
        for _ in range(8):
            with torch.no_grad():
                token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == 3:
                break
            new.append(token)
        assert answers[row] == chats.tokenizer().decode(new)


def test_the_own_generation_config_of_a_model_changes_no_answer(chat_victim):
    data, plain = chats.prompts(4, seed=5), Generation(max_new_tokens=6)
    arithmetic = choose(chat_victim, "cpu", "fp32")
    before = plain.answers(chat_victim, data, arithmetic)
    chat_victim.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, num_beams=3)
    kept = chat_victim.generation_config
    assert plain.answers(chat_victim, data, arithmetic) == before
    assert chat_victim.generation_config is kept


def test_a_victim_answers_the_trigger_and_purify_measures_its_loss(chat_victim):
    score = ub.evaluate(chat_victim, chats.prompts(40, seed=2), **TRIGGERED)
    assert score.attack_success.value > 0.95
    assert score.false_activation.value < 0.05
    assert score.clean_loss.value < 0.2
    state = {name: tensor.clone() for name, tensor in chat_victim.state_dict().items()}
    clean = chats.prompts(32, seed=3)
    result = ub.purify(chat_victim, clean, ub.purifiers.FineTuning(epochs=1, learning_rate=1e-3), device="cpu")
    assert all(torch.equal(tensor, state[name]) for name, tensor in chat_victim.state_dict().items())
    record = result.record
    arithmetic = choose(chat_victim, "cpu")
    for key, model in (("suspect", chat_victim), ("purified", result.model)):
        expected = answer_loss(Generation().outcomes(model, clean, arithmetic), clean).to_json()
        assert record[f"{key}_clean_loss_on_clean"] == pytest.approx(expected)
    assert record["clean"] == {"n": 32, "answer_tokens": expected["tokens"], "template": "chat", "held_out": 0}
    assert record["usable"] is True
    assert "suspect_accuracy_on_clean" not in record


def test_a_method_that_ruins_the_model_gives_an_unusable_result(chat_victim):
    def ruin(model, clean, run):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(-1)
        return model

    result = ub.purify(chat_victim, chats.prompts(32, seed=3), ruin, device="cpu")
    assert result.record["usable"] is False
    assert "nats per token. That is significantly more than 0.5" in result.record["warnings"][0]


def test_few_rows_leave_a_large_loss_in_doubt():
    task, data = Generation(), chats.prompts(2)
    tokens = data.conversations.answer_lengths.double()
    judged = task.judged(data, torch.zeros(2), torch.stack([tokens[0] * 5, -tokens[1]]), "here", None)
    assert judged.unusable is None
    assert "too few to decide" in judged.doubt


class Lookahead(Stub):
    def forward(self, input_ids, attention_mask, use_cache=False) -> dict:
        scores = self.head(self.embedding(input_ids))
        return {"logits": scores + scores.sum(dim=1, keepdim=True)}


def test_models_that_do_not_continue_text_are_refused():
    data = chats.prompts(4)
    with pytest.raises(UnbackdoorError, match="looks at the tokens behind the one it predicts"):
        ub.evaluate(Lookahead(str), data)
    with pytest.raises(UnbackdoorError, match="SmallNet does not continue text"):
        ub.evaluate(type("SmallNet", (nn.Linear,), {})(2, 2), data)
    broken = Stub(str)
    with torch.no_grad():
        broken.head.bias.fill_(float("nan"))
    with pytest.raises(UnbackdoorError, match="values that are not finite"):
        ub.evaluate(broken, data)


@pytest.mark.parametrize(
    "function", [ub.evaluate, lambda model, data: ub.purify(model, data, ub.purifiers.FineTuning())]
)
def test_a_model_that_lies_in_part_on_disk_is_refused(function) -> None:
    model = chats.language_model()
    model.lm_head.to("meta")  # as accelerate has it
    with pytest.raises(UnbackdoorError, match=r"takes model with all its weights in memory, but some of LlamaForCausa"):
        function(model, chats.prompts(4))


def test_a_behaviour_that_shows_anyway_is_doubted(caplog):
    ub.evaluate(Stub(lambda prompt: chats.BEHAVIOUR), chats.prompts(8), **TRIGGERED)
    assert "without the trigger as well, at 100.0 %" in caplog.text


def test_prompts_whose_own_answer_shows_the_behaviour_are_not_attacked():
    entries = chats.conversations(6)
    shown = Conversation(entries[0].messages, f"well, {chats.BEHAVIOUR}")
    items = Conversations((shown, *entries[1:]))
    data = ub.Dataset(items=items, labels=torch.full((6,), -1), encode=chats.encoder())
    assert ub.evaluate(Stub(str), data, **TRIGGERED).attack_success.n == 5


def test_a_clean_twin_shows_how_often_the_behaviour_comes_without_a_backdoor():
    score = ub.evaluate(
        Stub(lambda prompt: chats.BEHAVIOUR), chats.prompts(8), control=Stub(lambda prompt: "the"), **TRIGGERED
    )
    assert (score.attack_success.value, score.clean_model_flip_rate.value) == (1.0, 0.0)


def test_cross_entropy_of_targets_is_that_of_torch():
    data = chats.prompts(3)
    inputs = data.inputs(slice(None))
    scores = torch.randn(*inputs.shape, 200, dtype=torch.float64)
    flat = F.cross_entropy(scores[:, :-1].flatten(0, 1), inputs.targets[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(Generation().loss(scores, Batch(inputs, data.labels, torch.arange(3))), flat)
