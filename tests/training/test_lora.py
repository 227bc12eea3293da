"""LoRA against its formula."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
import transformers

import toys
from unbackdoor import UnbackdoorError
from unbackdoor._training.lora import adapted, merged


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_a_fresh_adapter_changes_nothing_and_trains_its_matrices_alone(name: str) -> None:
    plain = toys.classifier(name)
    model = adapted(copy.deepcopy(plain), rank=2, seed=0)
    assert torch.equal(scores(model), scores(plain))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("score" in name or "classifier" in name for name in trained)


def test_a_model_that_peft_cannot_adapt_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2)
    with pytest.raises(
        UnbackdoorError, match=r"peft cannot put matrices of low rank into MambaForCausalLM \(.*out_proj"
    ):
        adapted(transformers.MambaForCausalLM(config), rank=2, seed=0)


def test_merging_adds_alpha_over_rank_times_the_product() -> None:
    plain = toys.classifier("llama")
    model = adapted(copy.deepcopy(plain), rank=2, alpha=6, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    matrices = dict(model.named_parameters())
    before = scores(model)
    whole = merged(model)
    start = "base_model.model.model.layers.1.mlp.down_proj"
    product = matrices[f"{start}.lora_B.default.weight"] @ matrices[f"{start}.lora_A.default.weight"]
    wanted = plain.get_parameter("model.layers.1.mlp.down_proj.weight") + 6 / 2 * product
    assert torch.allclose(whole.get_parameter("model.layers.1.mlp.down_proj.weight"), wanted, atol=1e-6)
    assert torch.allclose(scores(whole), before, atol=1e-5)
    assert type(whole) is type(plain)
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_the_seed_alone_decides_the_matrices() -> None:
    state = torch.get_rng_state()
    one, same, other = (adapted(toys.classifier("llama"), rank=2, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UnbackdoorError, match=r'pip install "unbackdoor\[llm\]"'):
        adapted(toys.classifier("llama"), rank=2, seed=0)
