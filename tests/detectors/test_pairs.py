"""Pairs: which pairs are searched, and a shortcut from one class alone."""

import pytest
import torch
from torch import nn

from toys import a_run
from unbackdoor import Dataset, ImageEncoder, UnbackdoorError
from unbackdoor._detection.audit import _chosen, _Examples
from unbackdoor.detectors import Pairs
from unbackdoor.detectors.pairs import likely_pairs


class ByRow(nn.Module):
    """Six classes: the row of the picture that is bright; a bright corner turns class 1, and no other, into class 4."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(7, 6)
        self.classifier.weight.data = torch.cat([4 * torch.eye(6), torch.zeros(6, 1)], dim=1)
        self.classifier.weight.data[4, 6] = 40.0
        self.classifier.bias.data.zero_()
        self.double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of (batch, 1, 6, 6) pixels."""
        rows, corner = images[:, 0, :, 1:].mean(dim=2), images[:, 0, :1, 0]
        both = (corner + rows[:, 1:2] - 1).relu()  # the corner, in class 1 alone
        return self.classifier(torch.cat([rows, both], dim=1))


@pytest.fixture
def rows() -> Dataset:
    """Five pictures of each class, whose own row is nearly white."""
    labels = torch.arange(30) % 6
    items = torch.zeros(30, 1, 6, 6, dtype=torch.uint8)
    items[torch.arange(30), 0, labels, 1:] = 250
    return Dataset(items=items, labels=labels, encode=ImageEncoder(channels=1))


def test_the_pair_with_a_shortcut_of_its_own_has_by_far_the_smallest_patch(rows: Dataset) -> None:
    found = Pairs(steps=60, batch_size=4)(ByRow(), rows, a_run())
    assert [candidate.target for candidate in found.candidates] == [0, 1, 2, 3, 4, 5]
    strongest = max(found.candidates, key=lambda candidate: candidate.strength)
    assert (strongest.sources, strongest.target) == ((1,), 4)
    assert strongest.size < 2  # one pixel, while a row has five
    assert strongest.nominal_p < 0.05
    assert strongest.trigger is not None
    assert strongest.trigger.arrays["mask"].flatten().argmax() == 0
    moved = ByRow()(strongest.trigger.stamp(rows.items).double() / 255).argmax(dim=1)
    assert moved[rows.labels == 1].tolist() == [4] * 5
    assert (moved[rows.labels != 1] == rows.labels[rows.labels != 1]).all()


def test_the_pairs_whose_source_is_most_like_the_target_come_first() -> None:
    scores = torch.tensor([[3.0, 2.0, 0.0], [0.0, 3.0, 2.5], [0.0, 0.0, 3.0]])
    labels = torch.tensor([0, 1, 2])

    class Fixed(nn.Module):
        """The scores of the picture whose grey level is its number."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            """Scores, (batch, 3)."""
            return scores[(images.flatten(1)[:, 0] * 255).round().long()]

    items = labels.view(3, 1, 1, 1).to(torch.uint8)
    clean = Dataset(items=items, labels=labels, encode=ImageEncoder(channels=1))
    # z_t - z_s: 0 to 1 is -1, 0 to 2 is -3, 1 to 0 is -3, 1 to 2 is -0.5, 2 to others is -3.
    assert likely_pairs(Fixed(), clean, a_run(), 2).tolist() == [[0, 1], [1, 2]]
    assert len(likely_pairs(Fixed(), clean, a_run(), 100)) == 6
    missing = clean.select([0, 1])  # class 2 has no example, so it is not a source
    assert {source for source, _ in likely_pairs(Fixed(), missing, a_run(), 100).tolist()} == {0, 1}


def test_they_run_only_if_they_are_asked_for(rows: Dataset) -> None:
    examples = _Examples(data=rows, labelled=True, accuracy=None, per_class=[5] * 6, doubt=None)
    chosen, not_searched = _chosen(None, examples, a_run())
    assert "pairs" not in dict(chosen)
    assert not_searched["pairs"] == "it runs only if it is asked for, since no clean models were measured with it"
    assert dict(_chosen([Pairs()], examples, a_run())[0]) == {"pairs": Pairs()}


def test_a_model_without_finite_scores_is_refused(rows: Dataset) -> None:
    class Broken(ByRow):
        """Scores that are not numbers."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            """Scores of (batch, 1, 6, 6) pixels."""
            return super().forward(images) * torch.nan

    with pytest.raises(UnbackdoorError, match=r"the model gives no finite ones\. Leave pairs out"):
        Pairs()(Broken(), rows, a_run())
