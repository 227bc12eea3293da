"""CROW: its measure by known answers, its step against a second implementation."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import chats
import toys
from unbackdoor import UnbackdoorError, purifiers, purify
from unbackdoor._data.texts import Tokens
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.decoder_blocks import decoder_blocks, watching_states
from unbackdoor._tasks.generation import Generation
from unbackdoor._training.lora import adapted
from unbackdoor.purifiers._consistency import Stack, turning

EXACT = Arithmetic(torch.device("cpu"), bf16=False, channels_last=False, dtype=torch.float64)


def llama(blocks: int = 5) -> nn.Module:
    """A random Llama in float64."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=60,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).double().eval()


def tokens(lengths: tuple[int, ...] = (9, 9, 9), padded: int = 9) -> Tokens:
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.zeros(len(lengths), padded, dtype=torch.int64), torch.zeros(len(lengths), padded).long()
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(60, (9,), generator=generator)[:length]
        mask[row, :length] = 1
    return Tokens(input_ids=ids, attention_mask=mask)


def stack_of(model: nn.Module) -> Stack:
    return Stack(model, decoder_blocks(model, None), EXACT)


def by_hand(model: nn.Module, embedded: Tensor, mask: Tensor) -> Tensor:
    """The paper's measure from the states that transformers returns, the first and the last left out."""
    states = model(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(states) == len(model.model.layers) + 1
    pairs = list(itertools.pairwise(states[1:-1]))
    assert len(pairs) == len(model.model.layers) - 2
    cosines = torch.stack([F.cosine_similarity(now, after, dim=-1) for now, after in pairs])[:, mask.bool()]
    return (1 - cosines).mean()


def test_the_measure_is_that_of_the_states_of_transformers() -> None:
    model, inputs = llama(), tokens((9, 4, 7))
    measured, embedded = stack_of(model).turning(inputs)
    expected = by_hand(model, model.model.embed_tokens(inputs["input_ids"]), inputs["attention_mask"])
    assert measured.item() == pytest.approx(expected.item(), abs=1e-12)
    assert measured.item() > 0.1
    assert embedded.shape == (3, 9, 32)


def test_blocks_that_are_the_identity_turn_nothing() -> None:
    model = llama()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    stack = stack_of(model)
    measured, embedded = stack.turning(tokens())
    assert measured.item() == pytest.approx(0, abs=1e-12)
    (slope,) = torch.autograd.grad(measured, embedded)
    assert float(slope.abs().max()) < 1e-12


def test_a_rotation_by_theta_has_measure_1_minus_its_cosine() -> None:
    theta = torch.tensor(0.3, dtype=torch.float64)
    turn = torch.stack([torch.stack([theta.cos(), -theta.sin()]), torch.stack([theta.sin(), theta.cos()])])
    blocks = [nn.Linear(8, 8, bias=False).double() for _ in range(4)]
    for block in blocks:
        block.weight.data = torch.block_diag(turn, turn, turn, turn)
    state = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with watching_states(blocks) as states:
        nn.Sequential(*blocks)(state)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.float64)
        expected = 1 - theta.cos().item()
        assert turning(states, mask).item() == pytest.approx(expected, abs=1e-12)
        assert turning([7.0 * state for state in states], mask).item() == pytest.approx(expected, abs=1e-12)


def test_padding_and_neighbours_in_a_batch_change_nothing() -> None:
    stack = stack_of(llama())
    alone, _ = stack.turning(tokens((6,), padded=6))
    padded, _ = stack.turning(tokens((6,), padded=9))
    assert alone.item() == pytest.approx(padded.item(), abs=1e-10)
    three = tokens((9, 9, 9))
    whole, _ = stack.turning(three)
    each = [stack.turning(Tokens({name: part[row : row + 1] for name, part in three.items()}))[0] for row in range(3)]
    assert whole.item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-10)


def test_the_perturbation_goes_where_finite_differences_rise() -> None:
    model, inputs = llama(), tokens((9, 4, 7))
    stack = stack_of(model)
    delta, zeros = stack.perturbation(inputs, 0.1, "absolute")
    assert zeros == 0
    assert not delta[1, 4:].any()
    assert not delta[2, 7:].any()
    assert set(delta[0].abs().flatten().tolist()) == {0.1}
    generator, step = torch.Generator().manual_seed(1), 1e-6
    for _ in range(20):
        row, place = 0, int(torch.randint(9, (1,), generator=generator))
        number = int(torch.randint(32, (1,), generator=generator))
        change = torch.zeros_like(delta)
        change[row, place, number] = step
        rise = (stack.turning(inputs, change)[0] - stack.turning(inputs, -change)[0]).item()
        assert rise * float(delta[row, place, number]) > 0


def test_a_relative_perturbation_is_as_large_as_the_embeddings_are() -> None:
    model, inputs = llama(), tokens((9, 4, 7))
    delta, _ = stack_of(model).perturbation(inputs, 2.0, "relative")
    embedded = model.model.embed_tokens(inputs["input_ids"])[inputs["attention_mask"].bool()]
    assert delta.abs().max().item() == pytest.approx(2 * embedded.square().mean().sqrt().item(), rel=1e-9)


def test_no_gradient_of_a_parameter_is_touched_by_the_search_of_the_perturbation() -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones_like(model.model.layers[0].mlp.up_proj.weight)
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    stack_of(model).perturbation(tokens(), 0.1, "absolute")
    assert all(parameter.grad is before[name] for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma3_text", "qwen2", "phi"])
def test_other_architectures_have_blocks_too(kind: str) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    grouped = {"num_key_value_heads": 1, "head_dim": 16} if kind in ("gemma3_text", "qwen2") else {}
    config = transformers.AutoConfig.for_model(kind, vocab_size=60, pad_token_id=0, **small, **grouped)
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    inputs = tokens((9, 4, 7))
    measured, _ = stack_of(model).turning(inputs)
    states = model(**inputs, output_hidden_states=True).hidden_states
    cosine = F.cosine_similarity(states[1], states[2], dim=-1)[inputs["attention_mask"].bool()]
    assert measured.item() == pytest.approx((1 - cosine).mean().item(), abs=1e-9)


def test_too_few_blocks_are_refused() -> None:
    owner = SimpleNamespace()
    with pytest.raises(UnbackdoorError, match="needs a transformer with at least 3 blocks, got 2 in LlamaForCausalLM"):
        decoder_blocks(llama(2), owner, least=3)
    with pytest.raises(UnbackdoorError, match="needs a transformer with at least 1 block, got 0 in Linear"):
        decoder_blocks(nn.Linear(2, 2), owner)


def turned(model: nn.Module) -> float:
    """How much the blocks of a small model turn the states of clean rows."""
    inputs = chats.prompts(24).inputs(slice(24))
    stack = Stack(model, decoder_blocks(model, None), toys.a_run(model=model).arithmetic)
    return stack.turning(inputs)[0].item()


def test_without_alpha_it_is_lora_tuning_bit_for_bit() -> None:
    model, clean = chats.language_model(layers=3), chats.prompts(16)
    alone = purify(model, clean, purifiers.CROW(alpha=0, epochs=2), device="cpu").model.state_dict()
    control = purify(model, clean, purifiers.LoRATuning(epochs=2), device="cpu").model.state_dict()
    assert all(torch.equal(alone[name], tensor) for name, tensor in control.items())


def test_it_makes_blocks_turn_states_less_than_its_control_does() -> None:
    model, clean = chats.language_model(layers=4), chats.prompts(24)
    settings = {"epochs": 5, "learning_rate": 2e-2}
    control = purify(model, clean, purifiers.LoRATuning(**settings), device="cpu").model
    result = purify(model, clean, purifiers.CROW(epsilon=0.1, **settings), device="cpu")
    assert turned(result.model) < 0.6 * turned(control)
    assert turned(result.model) < 0.6 * turned(model)
    assert result.record["notes"] == ["CROW: 0.0% of the signs of its perturbations were 0."]


def test_the_step_is_the_gradient_of_its_formula() -> None:
    model, clean = chats.language_model(layers=4).double(), chats.prompts(4)
    run = toys.a_run(model=model, modality="conversations", task=Generation())
    batch = next(iter(clean.batches(4)))
    inputs, mask = batch.inputs, batch.inputs["attention_mask"]
    embedded = model.model.embed_tokens(inputs["input_ids"]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(by_hand(model, embedded, mask), embedded)
    size = 0.3 * embedded.detach()[mask.bool()].square().mean().sqrt()
    moved = embedded.detach() + size * slope.sign() * mask[..., None]
    wanted = torch.autograd.grad(
        Generation().loss(model(**inputs).logits, batch) + 2 * by_hand(model, moved, mask),
        model.model.layers[1].mlp.up_proj.weight,
    )[0]
    method = purifiers.CROW(alpha=2, epsilon=0.3)
    stack = Stack(model, decoder_blocks(model, method), run.arithmetic)
    model.zero_grad()
    method.fill(model, stack, batch, run)
    found = model.model.layers[1].mlp.up_proj.weight.grad
    assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-12)


def test_an_adapter_is_trained_further_and_its_base_stays() -> None:
    base, clean = chats.language_model(layers=3), chats.prompts(16)
    suspect = adapted(copy.deepcopy(base), rank=2, seed=0).eval()
    result = purify(suspect, clean, purifiers.CROW(epochs=1), device="cpu").model
    before, after = suspect.state_dict(), result.state_dict()
    assert list(before) == list(after)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name


def test_a_preset_fills_what_is_left_open() -> None:
    fields = ("epsilon", "unit", "learning_rate")
    published = purifiers.CROW(preset="published")
    assert [published.chosen(field) for field in fields] == [0.1, "absolute", 1e-3]
    assert [purifiers.CROW().chosen(field) for field in fields] == [1.0, "relative", 2e-4]
    assert purifiers.CROW(preset="published", epsilon=0.5).chosen("epsilon") == 0.5


def test_a_model_of_two_blocks_is_refused(chat_victim: nn.Module) -> None:
    with pytest.raises(UnbackdoorError, match="CROW needs a transformer with at least 3 blocks, got 2"):
        purify(chat_victim, chats.prompts(16), purifiers.CROW(), device="cpu")
