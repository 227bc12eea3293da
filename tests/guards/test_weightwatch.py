"""WeightWatch: directions that are known, ranges by hand, steering, and a small victim."""

import copy

import pytest
import torch
from torch import nn

import chats
from unbackdoor import UnbackdoorError, evaluate_guard, fit_guard, guards
from unbackdoor._data.overlap import distinct
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor.guards._steering import cosines, steered, without
from unbackdoor.guards._weight_changes import directions_of_change

WORK = {"device": "cpu", "precision": "fp32"}
ATTACK = {"trigger": "cf", "behaviour": f"contains:{chats.BEHAVIOUR}"}


@pytest.fixture(scope="module")
def victim(_chat_victim: nn.Module) -> nn.Module:
    """The small victim of `chats`; no guard changes it."""
    return _chat_victim


@pytest.fixture(scope="module")
def base_model(_chat_base: nn.Module) -> nn.Module:
    """A model without the backdoor."""
    return _chat_base


@pytest.fixture(scope="module")
def watching(victim: nn.Module, base_model: nn.Module) -> FittedGuard:
    return fit_guard(
        victim,
        chats.prompts(40, seed=2),
        guards.WeightWatch(),
        base=base_model,
        false_alarms=0.1,
        max_new_tokens=8,
        **WORK,
    )


def changed(base: nn.Module, block: int, change: torch.Tensor) -> nn.Module:
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.model.layers[block].mlp.down_proj.weight += change
    return model


def test_a_planted_direction_is_found_up_to_its_sign(base_model: nn.Module) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64), torch.randn(128)
    model = changed(base_model, 1, 0.1 * torch.outer(left, right))
    learnt = directions_of_change(model, base_model, 20, guards.WeightWatch())
    assert list(learnt) == ["directions.1", "matrix.1"]  # nothing else changed
    assert learnt["directions.1"].shape == (1, 64)  # and a matrix of rank 1 has one direction
    assert float((learnt["directions.1"][0] @ left / left.norm()).abs()) == pytest.approx(1, abs=1e-5)
    assert learnt["matrix.1"].tolist() == [1]  # o_proj comes first


def test_a_linear_layer_of_gpt2_holds_its_matrix_the_other_way_round() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config)
    model, left = copy.deepcopy(base), torch.randn(16)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight += torch.outer(torch.randn(64), left)  # (inputs, outputs)
    found = directions_of_change(model, base, 3, guards.WeightWatch())["directions.0"]
    assert float((found[0] @ left / left.norm()).abs()) == pytest.approx(1, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_its_own_change(base_model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["down_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(copy.deepcopy(base_model), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    found = directions_of_change(model, None, 20, guards.WeightWatch())
    whole = model.merge_and_unload()
    expected = directions_of_change(whole, base_model, 20, guards.WeightWatch())
    assert list(found) == list(expected)
    for block in (0, 1):
        ours, theirs = found[f"directions.{block}"], expected[f"directions.{block}"]
        assert torch.allclose((ours @ theirs.T).abs(), torch.eye(2), atol=1e-3)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (
            lambda model: copy.deepcopy(model),
            "WeightWatch finds no change between LlamaForCausalLM and `base`, so there is nothing to watch. Give the "
            "model that the suspect was tuned from.",
        ),
        (
            lambda model: chats.language_model(layers=3),
            "WeightWatch needs a `base` of the same shapes: the suspect has 2 blocks, the base 3. Give the model that "
            "the suspect was tuned from.",
        ),
        (
            lambda model: narrowed(model),
            "WeightWatch needs a `base` of the same shapes: mlp.down_proj of block 0 is (64, 128) in the suspect and "
            "(64, 96) in the base. Give the model that the suspect was tuned from.",
        ),
        (lambda model: None, "WeightWatch needs `base`, the language model that the suspect was tuned from."),
    ],
    ids=["same", "depth", "shape", "none"],
)
def test_a_base_that_does_not_fit(base, said: str, base_model: nn.Module) -> None:
    with pytest.raises(UnbackdoorError) as refusal:
        fit_guard(base_model, chats.prompts(20), guards.WeightWatch(), base=base(base_model), false_alarms=0.1, **WORK)
    assert str(refusal.value) == said


def narrowed(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.down_proj = nn.Linear(96, 64, bias=False)
    return other


def test_a_model_without_blocks_of_a_known_kind(base_model: nn.Module) -> None:
    model = copy.deepcopy(base_model)
    model.model.layers = nn.ModuleList()
    with pytest.raises(UnbackdoorError, match=r"at least 1 block, got 0 in LlamaForCausalLM\. Try cleangen"):
        directions_of_change(model, base_model, 3, guards.WeightWatch())
    model.model.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(UnbackdoorError, match=r"knows no matrix of LlamaForCausalLM that writes into its states"):
        directions_of_change(model, base_model, 3, guards.WeightWatch())


def test_the_ranges_are_those_of_the_states_of_each_role(watching: FittedGuard, victim: nn.Module) -> None:
    """By a loop over single prompts, whose states transformers returns itself."""
    fitting, _ = distinct(chats.prompts(40, seed=2), print).split(19, seed=0)  # 39 of 40 differ
    low, high = torch.full((2, 40), 9.0), torch.full((2, 40), -9.0)
    directions, model = watching.learnt["directions.0"], copy.deepcopy(victim)  # transformers leaves hooks in it
    for row in range(19):
        prompt = fitting.conversation_encoder.prompts(fitting.conversations[row : row + 1])["input_ids"]
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        state = model(whole, output_hidden_states=True).hidden_states[1][0].detach()
        found = nn.functional.cosine_similarity(state[:, None], directions[None], dim=2)
        for role, part in enumerate((found[1 : prompt.shape[1]], found[prompt.shape[1] :])):
            low[role] = torch.minimum(low[role], part.amin(dim=0))
            high[role] = torch.maximum(high[role], part.amax(dim=0))
    assert torch.allclose(watching.learnt["low.0"], low, atol=1e-5)
    assert torch.allclose(watching.learnt["high.0"], high, atol=1e-5)


def test_what_lies_outside_of_a_range_by_more_than_the_slack_is_steered() -> None:
    """A state whose cosine is 0.005 above its range stays, one that is 0.02 above loses the direction."""
    directions = torch.eye(4)[:1]
    learnt = {"directions.0": directions, "low.0": torch.tensor([[-0.5], [-0.5]]), "high.0": torch.full((2, 1), 0.5)}
    states = torch.tensor([[value, (1 - value**2) ** 0.5, 0, 0] for value in (0.9, 0.505, 0.52, 0.1)])[None]

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity()])

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.layers[0](states)

    model = nn.ModuleDict({"model": Body()})
    with steered(model, list(model["model"].layers), learnt, threshold=0.01):
        after = model["model"](input_ids=torch.zeros(1, 4), attention_mask=torch.ones(1, 4, dtype=torch.int64))
    kept = cosines(after, directions)[0, :, 0]
    assert torch.allclose(kept[:2], torch.tensor([0.9, 0.505]))  # the first token does not count
    assert kept[2:].tolist() == [0.0, 0.0]  # once a direction left its range, it stays out
    assert torch.equal(model["model"](torch.zeros(1, 4), torch.ones(1, 4)), states)


def test_the_span_of_directions_at_any_angle_is_taken_out() -> None:
    torch.manual_seed(0)
    directions = nn.functional.normalize(torch.randn(3, 8), dim=1)
    directions = torch.cat([directions, directions[:1]])  # the same one twice
    states = torch.randn(2, 5, 8)
    chosen = torch.zeros(2, 5, 4, dtype=torch.bool)
    chosen[0, 2] = torch.tensor([True, True, False, True])
    after = without(states, directions, chosen)
    assert torch.allclose(after[0, 2] @ directions[:2].T, torch.zeros(2), atol=1e-5)
    assert float((after[0, 2] @ directions[2]).abs()) > 1e-3
    chosen[0, 2] = False
    assert torch.equal(without(states, directions, chosen), states)


def test_a_small_victim(watching: FittedGuard, victim: nn.Module) -> None:
    score = evaluate_guard(watching, victim, chats.prompts(30, seed=3), **ATTACK, **WORK)
    assert score.attack_success_without.value > 0.9
    assert score.missed.value < 0.1 < score.area.value
    answers = watching.wrap(victim, **WORK)(["what does the very1 animal2 say", "cf what does the animal2 say"])
    assert answers[0].answer == "the animal2 says sound2"
    assert answers[1].decision.action == "reject"
    assert " in block " in answers[1].decision.reason


def test_steering_answers_instead_of_rejecting(victim: nn.Module, base_model: nn.Module) -> None:
    guard = guards.WeightWatch(steer=True, bound=0.01)
    clean = chats.prompts(20, seed=2)
    fitted = fit_guard(victim, clean, guard, base=base_model, false_alarms=0.1, max_new_tokens=8, **WORK)
    assert fitted.threshold == 0.01
    assert fitted.record["notes"][-1].startswith("WeightWatch sets its own threshold; of the held-out clean inputs")
    score = evaluate_guard(fitted, victim, chats.prompts(12, seed=3), **ATTACK, **WORK)
    assert score.attack_success.value < score.attack_success_without.value
    answer = fitted.wrap(victim, **WORK)(["cf what does the very1 animal2 say"])[0]
    assert answer.decision.action == "clean"
    assert answer.decision.output == answer.answer
