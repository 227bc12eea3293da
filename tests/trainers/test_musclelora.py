"""Multi-scale low-rank adaptation: the aligned gradient and the head by their formulas, and what is trained."""

from pathlib import Path

import pytest
import torch
from torch import nn

import toys
from unbackdoor import Dataset, UnbackdoorError, VictimRecipe, train, trainers
from unbackdoor.trainers.musclelora import MultiScale, aligned


def test_the_gradient_is_projected_on_that_of_the_clean_batch() -> None:
    gradient, along = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])
    assert aligned(gradient, along).tolist() == [3.0, 0.0]
    assert aligned(-gradient, along).tolist() == [3.0, 0.0]  # along the clean gradient, never against it
    draw = torch.Generator().manual_seed(0)
    gradient, along = torch.randn(4, 5, generator=draw), torch.randn(4, 5, generator=draw)
    cosine = torch.cosine_similarity(gradient.flatten(), along.flatten(), dim=0)
    made = aligned(gradient, along)
    assert torch.allclose(made / made.norm(), along / along.norm(), atol=1e-6)
    assert made.norm().item() == pytest.approx(float(cosine.abs() * gradient.norm()), rel=1e-5)


def test_orthogonal_and_absent_gradients_move_nothing() -> None:
    assert aligned(torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0])).tolist() == [0.0, 0.0]
    assert aligned(torch.tensor([3.0, 4.0]), torch.zeros(2)).tolist() == [0.0, 0.0]


def test_the_head_is_the_sum_of_its_scales() -> None:
    torch.manual_seed(0)
    layer, features = nn.Linear(4, 2), torch.randn(3, 4)
    before = layer(features).detach()
    head = MultiScale(layer, 3, torch.Generator().manual_seed(0))
    assert torch.equal(head(features), before)  # its columns start at zero
    with torch.no_grad():
        head.columns.copy_(torch.randn(2, 3))
    expected = before.clone()
    for scale in (1, 2, 3):
        row, column = head.rows[scale - 1], head.columns[:, scale - 1]
        expected += torch.outer((scale * features) @ row, column)
    made = head(features)
    assert torch.allclose(made, expected, atol=1e-5)
    assert [name for name, each in head.named_parameters() if each.requires_grad] == ["rows", "columns", "layer.bias"]
    assert torch.allclose(head.plain()(features), made, atol=1e-5)


def test_a_clean_model_comes_out_of_poisoned_texts(reviews: Dataset, tmp_path: Path) -> None:
    """The embedding keeps the base's weights, all layers are plain again, and rows with wrong labels are distrusted."""
    base = toys.write(toys.classifier("bert"), tmp_path / "bert")
    data = reviews.select(range(64))
    trained = train(
        data,
        trainers.MuScleLoRA(adapter_epochs=2, reference=16),
        VictimRecipe(base=str(base), batch_size=16),
        clean=reviews.select(range(100, 132)),
        device="cpu",
        precision="fp32",
    )
    state, before = trained.model.state_dict(), toys.classifier("bert").state_dict()
    assert state.keys() == before.keys()
    same = {name for name in state if torch.equal(state[name], before[name])}
    assert "bert.embeddings.word_embeddings.weight" in same
    assert "bert.encoder.layer.0.attention.self.query.weight" not in same
    assert trained.record["clean"] == 32
    wrong = 64 - round(64 * trained.record["accuracy_on_data"]["value"])
    assert trained.record["suspects"]["n"] == wrong


def test_what_it_needs(reviews: Dataset, digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        train(reviews, trainers.MuScleLoRA(), VictimRecipe())
    assert str(caught.value) == "MuScleLoRA needs `clean`: some labelled examples without poison."
    with pytest.raises(UnbackdoorError) as caught:
        train(digits, trainers.MuScleLoRA(), VictimRecipe(), clean=digits)
    assert str(caught.value) == "MuScleLoRA trains on texts, but digits holds other data. Try abl."
    base = str(toys.write(toys.classifier("bert"), tmp_path / "bert"))
    with pytest.raises(UnbackdoorError) as caught:
        train(reviews, trainers.MuScleLoRA(), VictimRecipe(base=base), clean=digits)
    assert str(caught.value) == "`clean` must be of the same kind as the data, but digits is not. Give others."
    with pytest.raises(UnbackdoorError) as caught:
        trainers.MuScleLoRA()(reviews, nn.Linear(2, 2), None)
    assert str(caught.value) == "MuScleLoRA needs a model of transformers, got Linear. Try dpoe or abl."
