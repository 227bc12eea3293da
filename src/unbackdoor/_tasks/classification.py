"""Classification: the class with the highest score is the answer, and is right or wrong."""

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._errors import printable
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import evaluating, logits
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._tasks.proportion import Proportion
from unbackdoor._tasks.score import Score


def predict(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """The class that the model takes each example for, (n,), on the CPU."""
    return answers(model, data, arithmetic).argmax(dim=1)


def hits(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """Which examples the model classifies as labelled, (n,), bool, on the CPU."""
    return predict(model, data, arithmetic) == data.labels.cpu()


@torch.no_grad()
def answers(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """The model's class scores in eval mode, row by row, (n, classes), on the CPU; float32 or better."""
    found = torch.empty(len(data), 1)
    with evaluating(model), arithmetic.placed(model) as placed:
        for first, batch in enumerate(data.to(arithmetic.device).batches(arithmetic.evaluation_batch)):
            with arithmetic.autocast():
                scores = logits(placed, arithmetic.lay(batch.inputs)).cpu()
            scores = scores if scores.dtype == torch.float64 else scores.float()
            if first == 0:
                found = torch.empty(len(data), scores.shape[1], dtype=scores.dtype)
            found[batch.rows.cpu()] = scores
    return found


def score(
    model: nn.Module,
    test: Dataset,
    attacked: Triggered | None,
    arithmetic: Arithmetic,
    *,
    control: nn.Module | None = None,
    control_encode: Encoder | None = None,
) -> Score:
    """The score on clean and already triggered examples that are known to fit the model."""
    taken_for = predict(model, test, arithmetic)
    labels = test.labels.cpu()
    names = test.classes or ()
    per_class = {}
    for label in labels.unique().tolist():
        mine = labels == label
        name = printable(names[label], 200) if label < len(names) else str(label)
        name = f"{name} ({label})" if name in per_class else name  # ImageNet has two cranes
        per_class[name] = _share(taken_for[mine] == label)
    clean_accuracy = _share(taken_for == labels)
    if attacked is None:
        return Score(clean_accuracy=clean_accuracy, per_class=per_class)
    taken_for = predict(model, attacked.data, arithmetic)
    wanted = attacked.wanted.cpu()
    flips = None
    if control is not None:
        shown = attacked.data if control_encode is None else attacked.data.encoded_by(control_encode)
        flips = _share(predict(control, shown, arithmetic) == wanted)
    return Score(
        clean_accuracy=clean_accuracy,
        per_class=per_class,
        attack_success=_share(taken_for == wanted),
        recovered_accuracy=_share(taken_for == attacked.data.labels.cpu()),
        label_rule=attacked.label_rule,
        clean_model_flip_rate=flips,
    )


def _share(hits: Tensor) -> Proportion:
    return Proportion(int(hits.sum()), len(hits))
