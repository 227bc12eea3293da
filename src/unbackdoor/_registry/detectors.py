"""The detectors: names, classes and facts."""

from unbackdoor._registry.entries import Entry, Need

REGISTRY = (
    Entry(
        "patch",
        "unbackdoor.detectors.patch:Patch",
        "the smallest mask and pattern that move examples to each class",
        needs=(Need.INPUTS,),
        year=2019,
        paper="Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
        blind="triggers over the whole picture, warps, triggers that differ between pictures",
    ),
)
