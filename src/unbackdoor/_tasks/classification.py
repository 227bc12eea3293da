"""Classification: the class with the highest score is the answer, and is right or wrong."""

import logging
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unbackdoor._data.classes import check_labels, in_order_of, report_class_order
from unbackdoor._data.dataset import Batch, Dataset, Encoder
from unbackdoor._errors import NoHeadError, UnbackdoorError, printable
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import check_partner, class_count, class_names, evaluating, explained, logits, probe
from unbackdoor._models.head import Head, head_of, passed_by
from unbackdoor._poisoning.attack_file import as_trigger
from unbackdoor._poisoning.triggered import Triggered, already_triggered, triggered
from unbackdoor._progress import Advance, nothing
from unbackdoor._tasks.damage import ALLOWED, lost_class, unusable, without_a_class
from unbackdoor._tasks.proportion import Proportion, chance_doubt, proportion_of
from unbackdoor._tasks.score import Score
from unbackdoor._tasks.task import Asked, Checked, Examined, Judgement, Measure, Warn
from unbackdoor._training.descent import cross_entropy

logger = logging.getLogger("unbackdoor")


def predict(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """Returns the class that the model answers for each example, (n,), on the CPU."""
    return answers(model, data, arithmetic).argmax(dim=1)


def hits(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """Returns which examples the model classifies as labelled, (n,), bool, on the CPU."""
    return _decided(model, data, arithmetic) == data.labels.cpu()


def _decided(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """Returns what `predict` does, but no class for answers that are not finite, as half precision may give some.

    The largest of such scores would be any class; they count as wrong, and a warning says how many there are.
    """
    scores = answers(model, data, arithmetic)
    lost = ~torch.isfinite(scores).all(dim=1)
    if lost.any():
        logger.warning(
            "%s answers %s of %s examples of %s with values that are not finite; they count as wrong. Try "
            "`precision='fp32'`, or look at its buffers.",
            type(model).__name__,
            f"{int(lost.sum()):,}",
            f"{len(data):,}",
            data.name,
        )
    return scores.argmax(dim=1).masked_fill(lost, -2)


@torch.no_grad()
def answers(model: nn.Module, data: Dataset, arithmetic: Arithmetic, advance: Advance = nothing) -> Tensor:
    """Returns the model's class scores in eval mode, row by row, (n, classes), on the CPU; float32 or better.

    Args:
        model: a classifier.
        data: images or texts.
        arithmetic: device, precision, layout.
        advance: called after each batch of `arithmetic.evaluation_batch`.
    """
    rows = torch.empty(len(data), 1)
    with evaluating(model), arithmetic.placed(model) as placed:
        for first, batch in enumerate(data.to(arithmetic.device).batches(arithmetic.evaluation_batch)):
            with explained(placed, batch.inputs), arithmetic.autocast():
                scores = logits(placed, arithmetic.lay(batch.inputs)).cpu()
            scores = scores if scores.dtype == torch.float64 else scores.float()
            if first == 0:
                rows = torch.empty(len(data), scores.shape[1], dtype=scores.dtype)
            rows[batch.rows.cpu()] = scores
            advance()
    return rows


def flip_rate(model: nn.Module, attacked: Triggered, arithmetic: Arithmetic) -> Proportion:
    """Returns the share of triggered examples that a model classifies as the attacker wants."""
    return proportion_of(_decided(model, attacked.data, arithmetic) == attacked.wanted.cpu())


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
    predicted = _decided(model, test, arithmetic)
    labels = test.labels.cpu()
    names = test.classes or ()
    per_class = {}
    for label in labels.unique().tolist():
        members = labels == label
        name = printable(names[label], 200) if label < len(names) else str(label)
        name = f"{name} ({label})" if name in per_class else name  # ImageNet has two cranes
        per_class[name] = proportion_of(predicted[members] == label)
    clean_accuracy = proportion_of(predicted == labels)
    if attacked is None:
        return Score(clean_accuracy=clean_accuracy, per_class=per_class)
    predicted = _decided(model, attacked.data, arithmetic)
    wanted = attacked.wanted.cpu()
    flips = None
    if control is not None:
        shown = attacked.data if control_encode is None else attacked.data.encoded_by(control_encode)
        flips = flip_rate(control, attacked._replace(data=shown), arithmetic)
    return Score(
        clean_accuracy=clean_accuracy,
        per_class=per_class,
        attack_success=proportion_of(predicted == wanted),
        recovered_accuracy=proportion_of(predicted == attacked.data.labels.cpu()),
        label_rule=attacked.label_rule,
        clean_model_flip_rate=flips,
    )


@dataclass(frozen=True)
class Classification:
    """The task of models whose answer is one of a fixed number of classes; see `Task`."""

    modalities: ClassVar[tuple[str, ...]] = ("images", "text")
    own_head: ClassVar[bool] = True
    measure: ClassVar[Measure] = Measure(
        "clean accuracy", "a loss of accuracy", "points of accuracy", "points", scale=100, digits=1
    )
    loss = staticmethod(cross_entropy)
    outcomes = staticmethod(hits)
    score = staticmethod(score)
    flip_rate = staticmethod(flip_rate)

    def predicted(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns all scores, (batch, classes), and the labels, (batch,)."""
        return scores, batch.labels

    def head(self, model: nn.Module, data: Dataset) -> Head:
        """Returns the last linear layer, found by running the model."""
        return head_of(model, probe(model, data))

    def quality(self, data: Dataset, outcomes: Tensor) -> Tensor:
        """Returns whether each answer is as labelled, (n,), bool."""
        return outcomes

    def weights(self, data: Dataset) -> Tensor:
        """Returns weights with which each class of the data counts alike, (n,), with a mean of 1.

        >>> two_and_one = Dataset(items=torch.zeros(3, 1, 2, 2, dtype=torch.uint8), labels=torch.tensor([0, 0, 1]))
        >>> Classification().weights(two_and_one).tolist()
        [0.75, 0.75, 1.5]
        """
        counts = torch.bincount(data.labels.cpu())
        return len(data) / (counts > 0).sum() / counts[data.labels.cpu()].double()

    def examined(
        self,
        model: nn.Module,
        clean: Dataset,
        arithmetic: Arithmetic,
        warn: Warn,
        head: str | None = None,
        *,
        headless: bool = False,
    ) -> Examined:
        """Check that model and clean examples fit each other, and classify these.

        Args:
            model: the suspect.
            clean: labelled examples.
            arithmetic: device, precision, layout.
            warn: function that gets a sentence about classes without an example, and about a suspect near chance.
            head: the name of the last linear layer; None finds it by running the model.
            headless: a model whose logits no linear layer makes will do.

        Raises:
            UnbackdoorError: there are fewer examples than classes, or examples of one class only; a label is not one of
                the model's; or the model has no linear head.
        """
        names = class_names(model)
        clean = in_order_of(clean, names)
        if len(clean) == 0:
            raise UnbackdoorError(f"{clean.name} is empty; at least one labelled clean example per class is needed.")
        try:
            name, layer = head_of(model, probe(model, clean), head)
            classes = layer.out_features
            if head is not None and passed_by(model, probe(model, clean), Head(name, layer)):
                warn(
                    f"`head` {name} is not all that makes the scores of {type(model).__name__}: what goes past it, "
                    "such as another head, may keep the backdoor. Compare with fine-tuning, which needs no head."
                )
        except NoHeadError:
            if not headless:
                raise
            name, classes = "", class_count(model, clean)
        check_labels(clean, classes)
        right = hits(model, clean, arithmetic)
        per_class = torch.bincount(clean.labels.cpu(), minlength=classes)
        _check_each_class(clean, per_class, warn)
        doubtful = chance_doubt("the suspect", proportion_of(right), classes, clean.name)
        if doubtful is not None:
            warn(doubtful)
        report_class_order(clean, names, classes, warn)
        return Examined(clean, name, right, tuple(per_class.tolist()))

    def checked(self, model: nn.Module, test: Dataset, triggered: Dataset | None = None) -> Checked:
        """Check that model and test examples fit each other.

        Args:
            model: any classifier.
            test: clean examples.
            triggered: examples that already carry a trigger.

        Raises:
            UnbackdoorError: the model is not a classifier, or a label is not one of its classes.
        """
        classes, names = class_count(model, test), class_names(model)
        test = in_order_of(test, names)
        check_labels(test, classes)
        report_class_order(test, names, classes)
        if triggered is not None:
            triggered = in_order_of(triggered, names)
            check_labels(triggered, classes)
        return Checked(test, triggered, classes)

    def check_asked(self, asked: Asked) -> None:
        """Refuse an attack next to examples that carry a trigger, and one of examples and target without the other."""
        if asked.trigger is not None or asked.behaviour is not None:
            raise UnbackdoorError("`trigger` and `behaviour` are for language models; a classifier takes `attack`.")
        if asked.attack is not None and asked.triggered is not None:
            raise UnbackdoorError("evaluate takes `attack` or `triggered_data`, got both. Leave one out.")
        if (asked.triggered is None) != (asked.target is None):
            raise UnbackdoorError(
                "`triggered_data` and `target` go together: the examples, and the class that the attacker wants."
            )

    def attacked(self, checked: Checked, asked: Asked) -> Triggered | None:
        """The examples that the attack is meant to move, with its trigger; None without an attack."""
        if asked.attack is not None:
            return triggered(checked.test, as_trigger(asked.attack, checked.test), checked.classes)
        if checked.triggered is not None and asked.target is not None:
            return already_triggered(checked.triggered, asked.target, checked.classes)
        return None

    def check_control(self, control: nn.Module, test: Dataset, encode: Encoder | None, classes: int) -> None:
        """Refuse a control that cannot take the data, or that has another number of classes."""
        check_partner("`control`", control, test, encode, classes)

    def check_room(self, model: nn.Module, attacked: Any, encode: Encoder | None = None) -> None:
        """A class is always an answer."""

    def doubt(self, owner: str, score: Score, classes: int, where: str) -> str | None:
        """A sentence that doubts a clean accuracy near chance; None if it is well above."""
        return chance_doubt(owner, score.clean_accuracy, classes, where)

    def clean_facts(self, examined: Examined) -> dict[str, Any]:
        """The number of clean examples, in all and of each class, and their augmentation."""
        clean = examined.clean
        return {"n": len(clean), "per_class": list(examined.per_class), "augment": asdict(clean.augment)}

    def figures(self, clean: Dataset, before: Tensor, after: Tensor) -> dict[str, Any]:
        """The accuracy of suspect and result."""
        return {
            "suspect_accuracy_on_clean": proportion_of(before).to_json(),
            "purified_accuracy_on_clean": proportion_of(after).to_json(),
        }

    def lost_a_class(self, data: Dataset, before: Tensor, after: Tensor) -> bool:
        """Whether most of what the suspect knew of a class is lost."""
        return lost_class(data, before, after) is not None

    def judged(self, data: Dataset, before: Tensor, after: Tensor, which: str, method: object) -> Judgement:
        """Whether the result lost significantly more than 10 points, or most of a class; see `Task`."""
        damage = unusable(before, after, which, method)
        damage = damage or without_a_class(data, before, after, which, method)
        lost = float(before.double().mean() - after.double().mean())
        if damage is not None or lost <= ALLOWED:
            return Judgement(damage, None)
        return Judgement(
            None,
            f"the purified model's accuracy on {len(before):,} clean examples, {which}, fell by {100 * lost:.1f} "
            f"points; they are too few to decide whether more than {100 * ALLOWED:.0f} points are lost. Score it on "
            "others (`test`), or give more.",
        )


CLASSIFICATION = Classification()


def _check_each_class(clean: Dataset, per_class: Tensor, warn: Warn) -> None:
    """Refuse fewer examples than classes, and examples of one class alone; warn of classes without an example."""
    classes = len(per_class)
    if len(clean) < classes:
        raise UnbackdoorError(
            f"{clean.name} must hold at least one example for each of the {classes} classes, got {len(clean)} in all. "
            "Add clean examples."
        )
    absent = torch.nonzero(per_class == 0).flatten().tolist()
    if len(absent) == classes - 1:
        only = int(per_class.argmax())
        raise UnbackdoorError(
            f"{clean.name} holds one class only ({clean.class_name(only)}): it says nothing about others, and a model "
            "that is tuned on it learns to answer with that class alone. Add clean examples of the other "
            f"class{'es' * (classes > 2)}."
        )
    if absent:
        known = dict(enumerate(clean.classes or ()))
        names = [known.get(label, str(label)) for label in absent[:5]]
        more = ", ..." if len(absent) > 5 else ""
        warn(
            f"{clean.name} has no example of {len(absent)} class(es) ({', '.join(names)}{more}): it says nothing about "
            "them, and a model that is purified with it will probably lose them."
        )
