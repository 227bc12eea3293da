"""The work of `purify` for every method: copy, seed, check, record; and what it refuses."""

import dataclasses
import logging
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fixtures import SmallCNN
from unbackdoor import Dataset, Run, UnbackdoorError, attacks, purifiers, purify

QUICK = purifiers.FineTuning(epochs=1)


def test_the_record_has_what_repeats_a_run(small_cnn: SmallCNN, digits: Dataset) -> None:
    clean = digits.select(range(200))
    record = purify(small_cnn, clean, purifiers.FST(epochs=2), seed=7, precision="fp32").record
    assert record["method"]["name"] == "fst"
    assert record["method"]["parameters"] == dataclasses.asdict(purifiers.FST(epochs=2))
    assert record["seed"] == 7
    assert record["head"] == "classifier"
    assert record["examples_seen"] == 400
    assert record["clean"]["n"] == sum(record["clean"]["per_class"]) == 200
    assert record["clean"]["held_out"] == 0
    assert record["suspect_accuracy_on_clean"]["n"] == 200
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 50_000_000
    assert "float32" in record["device"]
    assert record["versions"]["torch"] == torch.__version__


def test_modes_and_frozen_parameters_come_back(small_cnn: SmallCNN, digits: Dataset) -> None:
    small_cnn.train()
    small_cnn.features[0].eval()
    small_cnn.features[0].weight.requires_grad_(False)
    result = purify(small_cnn, digits.select(range(100)), QUICK).model
    assert [module.training for module in result.modules()] == [module.training for module in small_cnn.modules()]
    assert not result.features[0].weight.requires_grad
    assert result.features[0].bias.requires_grad
    assert all(parameter.grad is None for parameter in result.parameters())
    assert not torch.equal(result.features[0].weight, small_cnn.features[0].weight)  # tuned all the same


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_come_back_as_they_were(dtype: torch.dtype, small_cnn: SmallCNN, digits: Dataset) -> None:
    small_cnn.to(dtype)
    result = purify(small_cnn, digits.select(range(100)), QUICK).model
    assert {parameter.dtype for parameter in result.parameters()} == {dtype}
    assert result.state_dict()["features.1.num_batches_tracked"].dtype == torch.int64


def test_bf16_and_fp32_agree(small_cnn: SmallCNN, digits: Dataset) -> None:
    """The fast arithmetic must not cost accuracy: nearly the same predictions from the same seed."""
    from unbackdoor._models.arithmetic import choose
    from unbackdoor._tasks.classification import predict

    clean, test = digits.split(600, seed=0)
    method = purifiers.FineTuning(epochs=5, learning_rate=0.05)
    results = {precision: purify(small_cnn, clean, method, precision=precision).model for precision in ("bf16", "fp32")}
    found = {name: predict(model, test, choose(model, "cpu", "fp32")) for name, model in results.items()}
    accuracy = {name: (labels == test.labels).float().mean().item() for name, labels in found.items()}
    assert accuracy["fp32"] > 0.9
    assert abs(accuracy["fp32"] - accuracy["bf16"]) < 0.02


def test_an_empty_data_set(small_cnn: SmallCNN, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError, match=r"^digits is empty; at least one labelled clean example per class is"):
        purify(small_cnn, digits.select([]), QUICK)


def test_a_label_outside_the_head(small_cnn: SmallCNN, digits: Dataset) -> None:
    labels = digits.labels.clone()
    labels[312] = 10
    message = r"^digits has label 10 in row 312, but the model has 10 classes \(0 to 9\)\."
    with pytest.raises(UnbackdoorError, match=message):
        purify(small_cnn, dataclasses.replace(digits, labels=labels), QUICK)


def test_fewer_examples_than_classes(small_cnn: SmallCNN, digits: Dataset) -> None:
    message = r"^digits must hold at least one example for each of the 10 classes, got 9 in all\. Add clean examples\.$"
    with pytest.raises(UnbackdoorError, match=message):
        purify(small_cnn, digits.select(range(9)), QUICK)


def test_weights_that_are_not_finite(small_cnn: SmallCNN, digits: Dataset) -> None:
    with torch.no_grad():
        small_cnn.classifier.weight[0, 0] = float("inf")
    with pytest.raises(UnbackdoorError, match=r"^SmallCNN has values that are not finite in classifier\.weight;"):
        purify(small_cnn, digits, QUICK)


def test_a_learning_rate_that_explodes(small_cnn: SmallCNN, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError, match=r"^FineTuning left non-finite values in .*\. Lower its learning rate\.$"):
        purify(small_cnn, digits.select(range(100)), purifiers.FineTuning(epochs=10, learning_rate=1e20))


def test_a_class_without_a_clean_example_is_a_warning(
    small_cnn: SmallCNN, digits: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    clean = digits.select(torch.nonzero(digits.labels != 3).flatten()[:200])
    with caplog.at_level(logging.WARNING, "unbackdoor"):
        record = purify(small_cnn, clean, QUICK).record
    assert "digits has no example of 1 class(es) (3): it says nothing about them, and a model that is" in caplog.text
    assert any("no example of 1 class(es) (3)" in text for text in record["warnings"])


def test_a_missing_class_beyond_the_names_of_the_data_is_reported_by_its_number(
    small_cnn: SmallCNN, digits: Dataset
) -> None:
    clean = dataclasses.replace(
        digits.select(torch.nonzero(digits.labels < 8).flatten()[:200]), classes=tuple("abcdefgh")
    )
    warnings = purify(small_cnn, clean, QUICK).record["warnings"]
    assert any("no example of 2 class(es) (8, 9)" in text for text in warnings)
    assert any(
        "digits has 8 class names, but the model has 10 classes without names. They were numbered in order "
        "(a = 0, b = 1, c = 2, ...), which is right only if the model was trained that way" in text
        for text in warnings
    )


def test_a_result_that_collapses_on_its_own_examples_is_a_warning(small_cnn: SmallCNN, digits: Dataset) -> None:
    trained = purify(small_cnn, digits, purifiers.FineTuning(epochs=3, learning_rate=0.05)).model

    def forgets(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        nn.init.zeros_(run.head(model).weight)
        return model

    record = purify(trained, digits.select(range(100)), forgets).record
    assert record["suspect_accuracy_on_clean"]["value"] > 0.9
    assert record["purified_accuracy_on_clean"]["value"] < 0.3
    assert any("the ones it was tuned on, fell from 9" in text for text in record["warnings"])


def test_a_suspect_near_chance_is_a_warning(
    small_cnn: SmallCNN, digits: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "unbackdoor"):
        purify(small_cnn, digits.select(range(300)), QUICK)
    assert "the suspect is near chance on digits" in caplog.text
    assert "its labels, their order or the preprocessing probably do not fit the model." in caplog.text


def test_a_trained_suspect_gives_no_warning(small_cnn: SmallCNN, digits: Dataset) -> None:
    trained = purify(small_cnn, digits, purifiers.FineTuning(epochs=3, learning_rate=0.05)).model
    assert purify(trained, digits.select(range(100)), QUICK).record["warnings"] == []


def test_base_and_proxy_reach_the_method(small_cnn: SmallCNN, digits: Dataset) -> None:
    seen = []

    def method(model: nn.Module, clean: Dataset, run) -> nn.Module:
        seen.extend([run.base, run.proxy])
        return model

    base, proxy = SmallCNN(), SmallCNN()
    purify(small_cnn, digits.select(range(50)), method, base=base, proxy=proxy)
    assert seen == [base, proxy]


def test_parameters_are_refused_in_one_sentence() -> None:
    with pytest.raises(UnbackdoorError, match=r"^FST\.alpha must be at least 0, got -1\.0\.$|^FST\.alpha .* got -1\.$"):
        purifiers.FST(alpha=-1)
    with pytest.raises(UnbackdoorError, match=r"^FST\.epochs must be at least 1, got 0\.$"):
        purifiers.FST(epochs=0)
    with pytest.raises(UnbackdoorError, match=r"^FST\.epochs must be a whole number, got 1\.5\.$"):
        purifiers.FST(epochs=1.5)
    with pytest.raises(UnbackdoorError, match=r"^FST\.learning_rate must be more than 0, got 0\.$"):
        purifiers.FST(learning_rate=0)
    with pytest.raises(UnbackdoorError, match=r"^FST\.learning_rate must be a number, got fast\.$"):
        purifiers.FST(learning_rate="fast")
    with pytest.raises(UnbackdoorError, match=r"^FST\.alpha must be a finite number, got nan\.$"):
        purifiers.FST(alpha=float("nan"))
    with pytest.raises(
        UnbackdoorError, match=r"^FST has no field 'alhpa'; its fields are alpha, epochs, learning_rate"
    ):
        purifiers.FST(alhpa=1)  # type: ignore[call-arg]
    with pytest.raises(UnbackdoorError, match=r"^FST takes its fields by name, got 0\.1 without one\.$"):
        purifiers.FST(0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: purifiers.FST(epochs=True), "FST.epochs must be a whole number, got True."),
        (lambda: purifiers.FST(batch_size=False), "FST.batch_size must be a whole number, got False."),
        (lambda: purifiers.FST(alpha=True), "FST.alpha must be a number, got True."),
        (lambda: purifiers.PAM(learning_rate=True), "PAM.learning_rate must be a number, got True."),
        (lambda: attacks.BadNets(size=True), "BadNets.size must be a whole number, got True."),
        (lambda: attacks.TaCT(sources=(1, True)), "TaCT.sources.1 must be a whole number, got True."),
    ],
)
def test_true_does_not_count_as_one(made: Callable[[], object], message: str) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        made()
    assert str(caught.value) == message


def test_fields_of_true_and_false_take_them() -> None:
    assert purifiers.FST(project=False).project is False
    assert purifiers.FineMixing(tune=False, rho=None, freeze_filled=True).freeze_filled is True


def test_a_module_that_cannot_be_copied(small_cnn: SmallCNN, digits: Dataset) -> None:
    small_cnn.__dict__["lock"] = threading.Lock()
    with pytest.raises(UnbackdoorError) as refused:
        purify(small_cnn, digits.select(range(100)), QUICK)
    assert str(refused.value) == (
        "SmallCNN cannot be copied (cannot pickle '_thread.lock' object). Let its module keep nothing but tensors, "
        "modules and plain values."
    )


def test_an_absent_device(small_cnn: SmallCNN, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError, match=r"^`device` nonsense cannot be used here .*\. Try `device='cpu'`\.$"):
        purify(small_cnn, digits, QUICK, device="nonsense")


class Wide(nn.Module):
    """A classifier on features that a test can look at."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_any_module_with_a_linear_head_will_do(digits: Dataset) -> None:
    result = purify(Wide(), digits.select(range(300)), purifiers.FST(alpha=0.0, epochs=20, learning_rate=0.1))
    assert result.record["head"] == "fc"


def test_scoring_leaves_the_layout_of_the_weights(small_cnn: SmallCNN, digits: Dataset) -> None:
    from unbackdoor import evaluate

    test = digits.select(range(20))
    evaluate(small_cnn, test)
    assert small_cnn.features[4].weight.is_contiguous()
    small_cnn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch takes it
    evaluate(small_cnn, test)
    assert small_cnn.features[4].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_method_that_forgets_to_return_the_model(small_cnn: SmallCNN, digits: Dataset) -> None:
    def forgetful(model: nn.Module, clean: Dataset, run: object) -> None: ...

    with pytest.raises(
        UnbackdoorError, match=r"^forgetful must return the model, got NoneType\. End it in return model"
    ):
        purify(small_cnn, digits.select(range(50)), forgetful)


def test_what_is_no_method_and_no_data(small_cnn: SmallCNN, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(small_cnn, digits, "fst")
    assert str(caught.value) == "purify takes a method's value, got 'fst'. Take one of unbackdoor.purifiers."
    with pytest.raises(UnbackdoorError) as caught:
        purify(small_cnn, "clean.parquet", QUICK)
    assert str(caught.value) == "purify takes clean as a Dataset, got str. Load it with unbackdoor.Dataset.load."


def test_a_class_is_not_a_value(small_cnn: SmallCNN, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(small_cnn, digits, purifiers.ANP)
    assert str(caught.value) == "purify takes a method's value, got the class ANP. Write ANP()."


@pytest.mark.parametrize("given", ["some/path", (nn.Linear(2, 2), None)])
def test_a_model_that_is_no_module(given: object, small_cnn: SmallCNN, digits: Dataset) -> None:
    came = type(given).__name__
    with pytest.raises(UnbackdoorError) as caught:
        purify(small_cnn, digits, QUICK, base=given)
    assert str(caught.value) == (
        f"purify takes base as a module, got {came}. Load it with transformers.AutoModel.from_pretrained(PATH)."
    )
    with pytest.raises(UnbackdoorError) as caught:
        purify(small_cnn, digits, QUICK, proxy=given)
    assert str(caught.value) == f"purify takes proxy as a module, got {came}. Load it with unbackdoor.load(PATH).model."
    with pytest.raises(UnbackdoorError) as caught:
        purify(given, digits, QUICK)
    assert str(caught.value) == f"purify takes model as a module, got {came}. Load it with unbackdoor.load(PATH).model."


def test_the_step_that_needs_clean_examples_is_named(small_cnn: SmallCNN) -> None:
    with pytest.raises(UnbackdoorError, match=r"^ANP needs clean examples, got none\.$"):
        purify(small_cnn, None, purifiers.Then(purifiers.CLP(), purifiers.ANP()))


@pytest.mark.parametrize(
    ("count", "batch_size", "reported"),
    [
        (
            60,
            None,
            "60 examples in batches of 128 are 2 steps, and a backdoor may outlast them. Try `batch_size=8` as well.",
        ),
        (60, 16, None),
    ],
)
def test_few_steps_are_reported_once_unless_the_user_chose_the_batches(
    small_cnn: SmallCNN, digits: Dataset, count: int, batch_size: int | None, reported: str | None
) -> None:
    method = purifiers.FineTuning(epochs=2, batch_size=batch_size)
    notes = purify(small_cnn, digits.select(range(count)), method, device="cpu").record["notes"]
    assert notes == ([] if reported is None else [f"batches of the usual size make few steps: {reported}"])
