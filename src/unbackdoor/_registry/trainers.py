"""The trainers: names, classes and facts."""

from unbackdoor._registry.entries import Entry, Need

REGISTRY = (
    Entry(
        "plain",
        "unbackdoor.trainers.plain:Plain",
        "ordinary training, the control of the others: a backdoor gets in",
        modality=("images", "text", "image-text"),
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
    Entry(
        "dpoe",
        "unbackdoor.trainers.dpoe:DPoE",
        "trains together with a shallow model that learns the trigger and is thrown away",
        needs=(Need.BASE,),
        cost="one training with two passes of both models",
        year=2024,
        paper="From Shortcuts to Triggers: Backdoor Defense with Denoised PoE",
        modality=("text",),
        blind="triggers that need the upper blocks as the task does; a task as easy as the trigger is treated as one",
    ),
    Entry(
        "musclelora",
        "unbackdoor.trainers.musclelora:MuScleLoRA",
        "trains matrices of low rank, only along the gradients of clean texts",
        needs=(Need.CLEAN, Need.BASE),
        cost="10 epochs, and a batch of clean texts in each step",
        year=2024,
        paper="Acquiring Clean Language Models from Backdoor Poisoned Datasets by Downscaling Frequency Space",
        modality=("text",),
        blind="triggers for which clean and poisoned texts pull the weights the same way",
    ),
    Entry(
        "token-unlearning",
        "unbackdoor.trainers.token_unlearning:TokenUnlearning",
        "unlearns, on the words that stand out in them, pairs that fit badly at first and well at the end",
        needs=(Need.BASE,),
        cost="one training, and its first epoch once more",
        year=2024,
        paper="Efficient Backdoor Defense in Multimodal Contrastive Learning: A Token-Level Unlearning Method for"
        " Mitigating Threats",
        modality=("image-text",),
        blind="triggers that the first pass learns already; hard pairs, which fit late as well",
    ),
)
