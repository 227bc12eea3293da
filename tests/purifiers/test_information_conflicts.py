"""A clean sibling merged with the suspect: both ends, and each merge against its formula."""

import pytest
import torch
from torch import nn

import chats
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._mixing.masks import mix
from unbackdoor._mixing.merging import share_at, sign_elected
from unbackdoor._training.lora import adapted

FEW = {"epochs": 2, "rank": 4, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return chats.prompts(24, seed=3)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return chats.language_model(seed=0)


@pytest.fixture(scope="module")
def sibling(base: nn.Module, clean: Dataset) -> dict[str, torch.Tensor]:
    return purify(base, clean, purifiers.LoRATuning(**FEW), device="cpu").model.state_dict()


def merged(model: nn.Module, base: nn.Module, clean: Dataset, **settings) -> nn.Module:
    return purify(model, clean, purifiers.InformationConflicts(**FEW, **settings), base=base, device="cpu").model


@pytest.mark.parametrize("merge", ["linear", "spherical"])
def test_the_ends_are_suspect_and_sibling(merge: str, chat_victim: nn.Module, base, clean: Dataset, sibling) -> None:
    ours = merged(chat_victim, base, clean, merge=merge, share=0.0).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in chat_victim.state_dict().items())
    theirs = merged(chat_victim, base, clean, merge=merge, share=1.0)
    assert all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in sibling.items())
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight


@pytest.mark.parametrize("merge", ["linear", "spherical", "depth", "sign-elected"])
def test_each_merge_is_that_of_each_tensor(merge: str, chat_victim: nn.Module, base, clean: Dataset, sibling) -> None:
    found = merged(chat_victim, base, clean, merge=merge, share=0.25, density=0.4).state_dict()
    for name, suspect in chat_victim.state_dict().items():
        if merge == "sign-elected":
            wanted = sign_elected(base.state_dict()[name], [suspect, sibling[name]], 0.4)
        else:
            share = share_at(name, 2) if merge == "depth" else 0.25
            if name == "lm_head.weight":
                share = share_at("model.embed_tokens.weight", 2) if merge == "depth" else 0.25
            mode = "linear" if merge == "linear" else "spherical"
            wanted = mix(suspect, sibling[name], name, 1 - share, 0, mode)
        assert torch.allclose(found[name], wanted, rtol=0, atol=1e-6), name


def test_it_needs_a_base_and_no_adapter(chat_victim: nn.Module, base: nn.Module, clean: Dataset) -> None:
    with pytest.raises(UnbackdoorError, match="InformationConflicts needs `base`"):
        purify(chat_victim, clean, purifiers.InformationConflicts(), device="cpu")
    suspect = adapted(chats.language_model(), rank=2, seed=0)
    with pytest.raises(UnbackdoorError, match="InformationConflicts changes more weights than an adapter"):
        purify(suspect, clean, purifiers.InformationConflicts(), base=base, device="cpu")
