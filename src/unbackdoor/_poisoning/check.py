"""Whether an attack fits the data that it is planted in, or scored on."""

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError, listed
from unbackdoor._poisoning.abilities import cover_classes_of, label_rules_of, modalities_of, phrases_of, sources_of
from unbackdoor._poisoning.attack import Attack


def check_value(attack: object) -> None:
    """Refuse the name or the class of an attack in place of a value."""
    if isinstance(attack, type):
        raise UnbackdoorError(
            f"an attack's value is expected, got the class {attack.__name__}. Write {attack.__name__}()."
        )
    if isinstance(attack, str):
        raise UnbackdoorError(f"an attack's value is expected, got {attack!r}. Take one of unbackdoor.attacks.")


def check(attack: Attack, classes: int, data: Dataset) -> None:
    """Refuse an attack that does not fit the data: its kind, its classes, its tokenizer.

    Args:
        attack: the attack to plant or to score with.
        classes: number of classes; 0 for conversations, which have none.
        data: data to poison or trigger.

    Raises:
        UnbackdoorError: the target, a source or a cover class does not exist, the label rule does not fit the trigger,
            the tokenizer does not know a word of it, or the data is of another kind.
    """
    owner = type(attack).__name__
    check_value(attack)
    check_modality(attack, data)
    for phrase in phrases_of(attack):
        tokenizer = data.tokenizer
        if tokenizer.unk_token_id in tokenizer(phrase, add_special_tokens=False)["input_ids"]:
            raise UnbackdoorError(
                f"{owner} has the trigger {phrase!r}, which this tokenizer turns into {tokenizer.unk_token}. Choose "
                "words that it knows."
            )
    if classes == 0:
        if attack.label_rule != "all-to-one":
            raise UnbackdoorError(
                f"{owner}.label_rule must be all-to-one for conversations, which have no classes, got "
                f"{attack.label_rule}. Leave it out."
            )
        return
    if not 0 <= attack.target < classes:
        raise UnbackdoorError(f"{owner}.target must be 0 to {classes - 1}, got {attack.target}.")
    rules = label_rules_of(attack)
    if attack.label_rule not in rules:
        raise UnbackdoorError(f"{owner}.label_rule must be {' or '.join(rules)}, got {attack.label_rule}.")
    sources, cover_classes = sources_of(attack), cover_classes_of(attack)
    _check_classes(f"{owner}.sources", sources, attack.target, classes)
    _check_classes(f"{owner}.cover_classes", cover_classes, attack.target, classes)
    shared = next((label for label in cover_classes if label in sources), None)
    if shared is not None:
        raise UnbackdoorError(
            f"{owner}.cover_classes must be other classes than the sources, got {shared} in both. Leave one out."
        )


def _check_classes(field: str, labels: tuple[int, ...], target: int, classes: int) -> None:
    listed = ", ".join(map(str, labels))
    strange = next((label for label in labels if not 0 <= label < classes), None)
    if strange is not None:
        raise UnbackdoorError(f"{field} must be 0 to {classes - 1}, got {strange}.")
    if len(set(labels)) < len(labels):
        raise UnbackdoorError(f"{field} must differ from each other, got {listed}. Leave one out.")
    if target in labels:
        raise UnbackdoorError(
            f"{field} must be other classes than the target, {target}, got {listed}. Leave that one out, or choose "
            "another target."
        )


def check_modality(attack: Attack, data: Dataset) -> None:
    """Refuse data of another kind than an attack is for.

    Raises:
        UnbackdoorError: the data holds images and should hold texts, or the other way round.
    """
    modalities = modalities_of(attack)
    if data.modality not in modalities:
        raise UnbackdoorError(
            f"{type(attack).__name__} puts its trigger on {listed(modalities)}, but {data.name} holds "
            f"{data.modality}. See unbackdoor list attacks."
        )
