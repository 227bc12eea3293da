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
    Entry(
        "pattern",
        "unbackdoor.detectors.pattern:Pattern",
        "the smallest pattern over the whole picture that moves examples to each class",
        needs=(Need.CLEAN,),
        year=2022,
        paper="Detection of Backdoors in Trained Classifiers Without Access to the Training Set",
        blind="small and strong patches, warps, triggers that differ between pictures",
    ),
    Entry(
        "low-frequency-pattern",
        "unbackdoor.detectors.low_frequency_pattern:LowFrequencyPattern",
        "the smallest smooth pattern over the whole picture that moves examples to each class",
        needs=(Need.CLEAN,),
        year=2021,
        paper="Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective",
        blind="fine patterns, patches, warps, triggers that differ between pictures",
    ),
    Entry(
        "warp",
        "unbackdoor.detectors.warp:Warp",
        "the smallest affine map and smooth flow that move examples to each class",
        needs=(Need.CLEAN,),
        year=2021,
        paper="WaNet: Imperceptible Warping-based Backdoor Attack",
        blind="triggers that change the values of pixels, triggers that differ between pictures",
    ),
    Entry(
        "margin",
        "unbackdoor.detectors.margin:Margin",
        "the largest margin of each class over features inside the network, from clean starts",
        needs=(Need.INPUTS,),
        year=2024,
        paper="MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types Using a Maximum"
        " Margin Statistic",
        blind="networks whose margins were kept small, several target classes at once, backdoors of all classes",
    ),
    Entry(
        "noise",
        "unbackdoor.detectors.noise:Noise",
        "the smallest noise on normalisation layers that makes a model answer each class",
        needs=(Need.INPUTS, Need.NORMALISATION),
        year=2024,
        paper="BAN: Detecting Backdoors Activated by Adversarial Neuron Noise",
        blind="backdoors that share their units with the target class, several target classes at once",
    ),
)
