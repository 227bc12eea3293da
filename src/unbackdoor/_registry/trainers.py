"""The trainers: names, classes and facts."""

from unbackdoor._registry.entries import Entry

REGISTRY = (
    Entry(
        "plain",
        "unbackdoor.trainers.plain:Plain",
        "ordinary training, the control of the others: a backdoor gets in",
        modality=("images", "text"),
        cost="one training",
        blind="every trigger: it trusts all rows",
    ),
    Entry(
        "abl",
        "unbackdoor.trainers.abl:ABL",
        "isolates the rows that are learnt first, trains on the rest, and unlearns those",
        cost="one training, and its first epochs once more",
        year=2021,
        paper="Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
        modality=("images", "text"),
        blind="triggers that are not learnt sooner than the task, such as clean-label ones; few poisoned rows",
    ),
)
