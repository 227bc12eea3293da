"""The guards: names, classes and facts."""

from unbackdoor._registry.entries import Entry, Need

REGISTRY = (
    Entry(
        "strip",
        "unbackdoor.guards.strip:Strip",
        "rejects inputs whose class survives being mixed with clean ones",
        needs=(Need.CLEAN,),
        cost="n + 1 forward passes an input; n is 16 for images, 5 for texts",
        year=2019,
        paper="STRIP: A Defence Against Trojan Attacks on Deep Neural Networks",
        modality=("images", "text"),
        blind="triggers that mixing destroys or that make the model less sure, triggers of certain classes only",
    ),
    Entry(
        "badacts",
        "unbackdoor.guards.badacts:BadActs",
        "rejects inputs with activations outside the range of clean ones, or answers within bounds",
        needs=(Need.CLEAN,),
        cost="1 forward pass an input; with purify, 50 to 400 passes over the clean data to fit",
        year=2024,
        paper="BadActs: A Universal Backdoor Defense in the Activation Space",
        modality=("images", "text"),
        blind="triggers that leave activations where clean inputs have them, or move very few of them",
    ),
    Entry(
        "onion",
        "unbackdoor.guards.onion:Onion",
        "deletes words without which a text is far more likely to a language model",
        needs=(Need.CLEAN, Need.REFERENCE),
        cost="1 forward pass an input, and 1 for each word and 1 more of the reference",
        year=2021,
        paper="ONION: A Simple and Effective Defense Against Textual Backdoor Attacks",
        modality=("text",),
        blind="triggers that read like ordinary text (a sentence, a style), words that are unlikely only together",
    ),
    Entry(
        "rap",
        "unbackdoor.guards.rap:Rap",
        "rejects texts of whose class a learnt word makes the model hardly less sure",
        needs=(Need.CLEAN,),
        cost="2 forward passes an input; 150 steps of 32 texts to fit",
        year=2021,
        paper="RAP: Robustness-Aware Perturbations for Defending against Backdoor Attacks on NLP Models",
        modality=("text",),
        blind="triggers that hold the class no more firmly than clean texts do",
    ),
)
