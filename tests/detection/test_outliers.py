"""How far one class stands out, against published critical values and a simulation of classes without any."""

import torch

from unbackdoor._detection.outliers import outlier_p_values


def test_a_class_at_the_published_critical_value_has_a_p_value_of_five_percent() -> None:
    # Of 10 normal values, the largest (x - mean of others) / (sd of others * sqrt(1 + 1/9)) exceeds 3.35 in 5 %.
    others = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 1.0, 1.5])
    x = 3.35 * float(others.std()) * (1 + 1 / 9) ** 0.5
    p = outlier_p_values(torch.cat([others, torch.tensor([x])]))[-1]
    assert 0.045 < float(p) < 0.055


def test_classes_without_an_outlier_give_an_alarm_in_five_percent_of_models() -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (10, 43):
        smallest = [
            float(outlier_p_values(torch.randn(classes, generator=generator)).min())
            for _ in range(500 if classes == 10 else 200)
        ]
        rate = sum(p <= 0.05 for p in smallest) / len(smallest)
        assert 0.02 < rate < 0.08, (classes, rate)


def test_p_values_do_not_depend_on_scale_place_or_order() -> None:
    strengths = torch.tensor([0.3, -2.0, 1.0, 4.0, 0.0, -1.0])
    expected = outlier_p_values(strengths)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(outlier_p_values(7 * strengths + 100), expected, rtol=1e-4)
    assert torch.allclose(outlier_p_values(strengths[order]), expected[order])


def test_equal_classes_and_few_classes_do_not_stand_out() -> None:
    assert outlier_p_values(torch.zeros(10)).tolist() == [1.0] * 10
    assert outlier_p_values(torch.tensor([0.0, 100.0])).tolist() == [1.0, 1.0]


def test_a_spread_below_a_tenth_does_not_make_a_small_difference_abnormal() -> None:
    strengths = torch.tensor([0.0, 0.001, -0.001, 0.0005, 0.0, 0.05])
    assert float(outlier_p_values(strengths).min()) == 1.0
