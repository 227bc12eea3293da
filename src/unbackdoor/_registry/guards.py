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
)
