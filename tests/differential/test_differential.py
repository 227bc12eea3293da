"""Two hundred drawn models and data sets, each scored by the product and by an independent reading."""

from collections import Counter
from pathlib import Path

import pytest
from allowed import MOST, REFUSALS
from comparison import outcomes

CASES = 200


@pytest.mark.long
def test_the_product_answers_as_transformers_does(tmp_path: Path) -> None:
    made = list(outcomes(0, CASES, tmp_path))
    different = [outcome for outcome in made if outcome.what == "different"]
    assert not different, "\n".join(f"{each.number}: {each.kind}: {each.reported}" for each in different)
    refused = Counter(outcome.kind for outcome in made if outcome.what == "refused")
    assert set(refused) <= set(REFUSALS)
    assert refused.total() <= MOST / 100 * CASES, refused
