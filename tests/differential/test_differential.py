"""Two hundred drawn models and data sets, each scored by the product and by an independent reading."""

from collections import Counter
from pathlib import Path

import pytest
from allowed import MOST, REFUSALS
from comparison import outcomes

CASES, PARTS = 200, 4  # the parts may run side by side


@pytest.mark.parametrize("part", range(PARTS))
def test_the_product_answers_as_transformers_does(part: int, tmp_path: Path) -> None:
    count = CASES // PARTS
    made = list(outcomes(part * count, count, tmp_path))
    different = [outcome for outcome in made if outcome.what == "different"]
    assert not different, "\n".join(f"{each.number}: {each.kind}: {each.told}" for each in different)
    refused = Counter(outcome.kind for outcome in made if outcome.what == "refused")
    assert set(refused) <= set(REFUSALS)
    assert refused.total() <= MOST / 100 * count, refused
