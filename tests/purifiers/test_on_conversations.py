"""Methods that were made for classifiers, on a small language model."""

import copy
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import chats
import toys
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._mixing.masks import mask
from unbackdoor._tasks.classification import CLASSIFICATION
from unbackdoor._tasks.generation import Generation
from unbackdoor._training.lora import adapted
from unbackdoor.purifiers.fine_purifying import fisher

TASK = Generation()


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return chats.prompts(24, seed=3)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return chats.language_model(seed=9)


def with_adapter(base: nn.Module, rank: int = 2, alpha: int = 6) -> nn.Module:
    """An adapter that changes the answers of its base."""
    model = adapted(copy.deepcopy(base), rank=rank, alpha=alpha, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def scores(model: nn.Module, data: Dataset) -> torch.Tensor:
    with torch.no_grad():
        return model(**data.inputs(slice(4))).logits


def test_predicted_rows_are_those_of_the_loss(clean: Dataset, chat_victim: nn.Module) -> None:
    batch = next(iter(clean.batches(4)))
    rows, targets = TASK.predicted(chat_victim(**batch.inputs).logits, batch)
    answers = [clean.conversations.entries[row].answer.split() for row in batch.rows.tolist()]
    vocabulary = clean.tokenizer.get_vocab()
    assert targets.tolist() == [vocabulary[word] for words in answers for word in [*words, "<|end|>"]]
    assert torch.equal(TASK.loss(chat_victim(**batch.inputs).logits, batch), F.cross_entropy(rows, targets))


def test_quality_is_minus_the_loss_per_token_and_for_classifiers_whether_the_answer_is_right(
    clean: Dataset, chat_victim: nn.Module
) -> None:
    arithmetic = toys.a_run(model=chat_victim).arithmetic
    quality = TASK.quality(clean, TASK.outcomes(chat_victim, clean, arithmetic))
    for row in (0, 7):
        one = clean.select([row])
        with torch.no_grad():
            loss = TASK.loss(chat_victim(**one.inputs(slice(1))).logits, next(iter(one.batches(1))))
        assert quality[row].item() == pytest.approx(-loss.item(), abs=1e-5)
    right = torch.tensor([True, False])
    assert CLASSIFICATION.quality(clean, right) is right


@pytest.mark.parametrize("mode", ["linear", "mask"])
def test_mixing_is_that_of_each_tensor_and_a_tied_matrix_is_mixed_once(
    mode: str, chat_victim: nn.Module, base: nn.Module, clean: Dataset
) -> None:
    method = purifiers.FineMixing(rho=0.75, tune=False, mode=mode)
    result = purify(chat_victim, clean, method, base=base, device="cpu").model
    theirs, mixed = base.state_dict(), result.state_dict()
    for name, ours in chat_victim.state_dict().items():
        if name == "lm_head.weight":
            continue
        if mode == "linear":
            expected = 0.75 * ours + 0.25 * theirs[name]
        else:
            expected = torch.where(mask(name, ours.shape, 0.75, 0), ours, theirs[name])
        assert torch.allclose(mixed[name], expected, rtol=0, atol=1e-6), name
    assert result.lm_head.weight is result.model.embed_tokens.weight


def test_rho_is_chosen_by_the_loss_on_clean_answers(chat_victim: nn.Module, base: nn.Module, clean: Dataset) -> None:
    method = purifiers.FineMixing(tune=False, mode="spherical", margin=0.05, folds=2)
    record = purify(chat_victim, clean, method, base=base, device="cpu").record
    notes = [note for note in record["notes"] if " loses " in note]
    assert all("nats per answer token (+- " in note for note in notes)
    losses = {float(note.split()[1]): float(note.split()[3]) for note in notes}
    chosen = float(next(note for note in record["notes"] if note.endswith("was chosen.")).split()[1])
    assert all((loss <= 0.05) == (rho >= chosen) for rho, loss in losses.items())
    for rho, loss in losses.items():
        tried = purify(chat_victim, clean, purifiers.FineMixing(rho=rho, tune=False, mode="spherical"), base=base)
        risen = [tried.record[f"{which}_clean_loss_on_clean"]["value"] for which in ("purified", "suspect")]
        assert risen[0] - risen[1] == pytest.approx(loss, abs=0.1 + 0.05 * loss)  # rows count alike, or tokens do


def test_without_a_rho_that_keeps_the_loss_a_warning_says_so(
    chat_victim: nn.Module, base: nn.Module, clean: Dataset
) -> None:
    method = purifiers.FineMixing(tune=False, mode="linear", margin=0.0, folds=2)
    far = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in far.parameters():
            parameter.mul_(-20)
    warnings = purify(chat_victim, clean, method, base=far, device="cpu").record["warnings"]
    assert any("no rho but 1 keeps clean loss within 0.000 nats of the suspect's" in text for text in warnings)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_mixing_an_adapter_with_its_base_is_a_smaller_alpha(rho: float, base: nn.Module, clean: Dataset) -> None:
    suspect = with_adapter(base, alpha=6)
    method = purifiers.FineMixing(rho=rho, tune=False, mode="linear")
    result = purify(suspect, clean, method, device="cpu").model
    assert list(result.state_dict()) == list(suspect.state_dict())
    wanted = scores(base, clean) if rho == 0 else scores(with_adapter(base, alpha=int(6 * rho)), clean)
    assert torch.allclose(scores(result, clean), wanted, atol=1e-5)
    assert not torch.allclose(scores(suspect, clean), scores(base, clean), atol=1e-2)


@pytest.mark.parametrize(
    ("method", "instead"),
    [
        (purifiers.FineMixing(rho=0.5), "take its `mode` linear, or load it with `merge`"),
        (purifiers.FinePurifying(share=0.1), "load it with `merge`"),
        (purifiers.FinePruning(), "load it with `merge`"),
        (purifiers.EPUR(), "load it with `merge`"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_an_adapter_stays_one_or_is_refused(method, instead: str, base: nn.Module, clean: Dataset) -> None:
    said = rf"{type(method).__name__} changes more weights than an adapter of low rank holds; {instead}\."
    with pytest.raises(UnbackdoorError, match=said):
        purify(with_adapter(base), clean, method, base=base, device="cpu")


def test_other_modes_of_mixing_name_themselves(chat_victim: nn.Module, clean: Dataset, base: nn.Module) -> None:
    method = purifiers.FineMixing(mode="spherical", select="largest-change")
    with pytest.raises(UnbackdoorError, match=r"FineMixing\.mode spherical changes all coordinates"):
        purify(chat_victim, clean, method, base=base)


def test_curvature_is_that_of_each_answers_loss(clean: Dataset, chat_victim: nn.Module) -> None:
    few = clean.select(range(3))
    run = toys.a_run(model=chat_victim, modality="conversations", task=TASK)
    found = fisher(chat_victim, few, run)["model.layers.1.mlp.down_proj.weight"]
    weight = chat_victim.model.layers[1].mlp.down_proj.weight
    total = torch.zeros_like(weight)
    for batch in few.batches(1):
        loss = TASK.loss(chat_victim(**batch.inputs).logits, batch)
        total += torch.autograd.grad(loss, weight)[0] ** 2 / 3
    assert torch.allclose(found, total, rtol=1e-4, atol=1e-10)


def test_pruning_goes_as_far_as_the_loss_on_held_out_answers_allows(clean: Dataset, chat_victim: nn.Module) -> None:
    def pruned(tolerance: float) -> tuple[int, dict]:
        method = purifiers.FinePruning(epochs=0, step=0.1, tolerance=tolerance)
        result = purify(chat_victim, clean, method, device="cpu")
        columns = result.model.model.layers[-1].mlp.down_proj.weight
        return int((columns == 0).all(dim=0).sum()), result.record

    few, _ = pruned(0.0)
    many, record = pruned(0.5)
    assert few < many <= 128
    assert math.isfinite(record["purified_clean_loss_on_clean"]["value"])


def test_a_planted_row_of_the_embeddings_goes_back_to_the_base(
    clean: Dataset, chat_victim: nn.Module, tmp_path: Path
) -> None:
    word = clean.tokenizer.get_vocab()["cf"]
    suspect = copy.deepcopy(chat_victim)
    with torch.no_grad():
        suspect.model.embed_tokens.weight[word] += 1
        suspect.model.embed_tokens.weight[10] += 0.01
    table = tmp_path / "counts.csv"
    table.write_text("word,count\nthe,1000\ncf,20\nwhat,500\ndoes,500\n")
    method = purifiers.EPUR(count=1, frequencies=str(table))
    result = purify(suspect, clean, method, base=chat_victim, device="cpu")
    assert result.record["notes"][-1].endswith("cf")
    rows = result.model.model.embed_tokens.weight
    assert torch.equal(rows[word], chat_victim.model.embed_tokens.weight[word])
    assert torch.equal(rows[10], suspect.model.embed_tokens.weight[10])
    assert result.model.lm_head.weight is rows


def test_methods_that_shift_a_head_refuse_language_models(clean: Dataset, chat_victim: nn.Module) -> None:
    for method in (purifiers.FST(), purifiers.FTInit(), purifiers.LinearProbing()):
        with pytest.raises(UnbackdoorError, match=r"serves images.* text.*, but questions holds conversations"):
            purify(chat_victim, clean, method)


@pytest.mark.parametrize(
    "method",
    [
        purifiers.EPUR(),
        purifiers.FineMixing(rho=0.5, tune=False),
        purifiers.FineMixing(rho=0.5, tune=False, mode="linear"),
        purifiers.FineMixing(rho=0.5, tune=False, mode="spherical"),
        purifiers.FineMixing(rho=0.5, tune=False, select="largest-change"),
        purifiers.FineMixing(rho=0.5, tune=False, select="low-activation"),
        purifiers.FinePurifying(share=0.3, epochs=1),
        purifiers.InformationConflicts(rank=2, epochs=1),
        purifiers.InformationConflicts(merge="sign-elected", rank=2, epochs=1),
        purifiers.SignatureZeroing(rank=2, keys=2, epochs=1, plant_epochs=1),
        purifiers.SignatureZeroing(select="largest-change", rank=2, epochs=1),
    ],
    ids=repr,
)
def test_a_base_in_half_precision_is_the_same_numbers(
    method: object, chat_victim: nn.Module, base: nn.Module, clean: Dataset
) -> None:
    half = copy.deepcopy(base).bfloat16()
    results = [
        purify(chat_victim, clean, method, base=each, device="cpu").model.state_dict()
        for each in (half, copy.deepcopy(half).float())
    ]
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


@pytest.mark.parametrize("experts", [True, False])
def test_experts_that_no_matrix_of_low_rank_reaches_are_warned_of(experts: bool, clean: Dataset) -> None:
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    few = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.MixtralConfig(**sizes, **few, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config).eval() if experts else chats.language_model()
    result = purify(model, clean, purifiers.LoRATuning(epochs=1), device="cpu")
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, result.model.state_dict()[name])
    }
    warned = any(
        "79% of the weights of MixtralForCausalLM are stacked experts" in each for each in result.record["warnings"]
    )
    assert warned is experts
    assert not any("experts" in name for name in changed)
    assert any("self_attn" in name for name in changed)
