"""The attacks: what is registered, and the classes, imported on first use."""

from typing import TYPE_CHECKING, Any

from unbackdoor._registry import Entry, exported

if TYPE_CHECKING:
    from unbackdoor.attacks.adaptive_blend import AdaptiveBlend as AdaptiveBlend
    from unbackdoor.attacks.adaptive_patch import AdaptivePatch as AdaptivePatch
    from unbackdoor.attacks.badnets import BadNets as BadNets
    from unbackdoor.attacks.batt import BATT as BATT
    from unbackdoor.attacks.blended import Blended as Blended
    from unbackdoor.attacks.bpp import Bpp as Bpp
    from unbackdoor.attacks.bypass import Bypass as Bypass
    from unbackdoor.attacks.embedding_poisoning import EmbeddingPoisoning as EmbeddingPoisoning
    from unbackdoor.attacks.embedding_surgery import EmbeddingSurgery as EmbeddingSurgery
    from unbackdoor.attacks.input_aware import InputAware as InputAware
    from unbackdoor.attacks.label_consistent import LabelConsistent as LabelConsistent
    from unbackdoor.attacks.layer_wise import LayerWise as LayerWise
    from unbackdoor.attacks.logit_anchoring import LogitAnchoring as LogitAnchoring
    from unbackdoor.attacks.low_frequency import LowFrequency as LowFrequency
    from unbackdoor.attacks.mixing_aware import MixingAware as MixingAware
    from unbackdoor.attacks.prepared import Prepared as Prepared
    from unbackdoor.attacks.sentence import Sentence as Sentence
    from unbackdoor.attacks.siba import SIBA as SIBA
    from unbackdoor.attacks.sig import SIG as SIG
    from unbackdoor.attacks.tact import TaCT as TaCT
    from unbackdoor.attacks.transtroj import TransTroj as TransTroj
    from unbackdoor.attacks.wanet import WaNet as WaNet
    from unbackdoor.attacks.word import Word as Word

REGISTRY = (
    Entry(
        "badnets",
        "unbackdoor.attacks.badnets:BadNets",
        "a small patch at a fixed place",
        year=2017,
        paper="BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
    ),
    Entry(
        "blended",
        "unbackdoor.attacks.blended:Blended",
        "a picture or noise mixed in over the whole image",
        year=2017,
        paper="Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
    ),
    Entry(
        "sig",
        "unbackdoor.attacks.sig:SIG",
        "a sinusoid added to images of the target class (clean-label)",
        year=2019,
        paper="A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning",
    ),
    Entry(
        "label-consistent",
        "unbackdoor.attacks.label_consistent:LabelConsistent",
        "adversarially perturbed images of the target class with corner patches (clean-label)",
        year=2019,
        paper="Label-Consistent Backdoor Attacks",
    ),
    Entry(
        "wanet",
        "unbackdoor.attacks.wanet:WaNet",
        "a smooth warp of the image, with a noise mode while training",
        year=2021,
        paper="WaNet: Imperceptible Warping-based Backdoor Attack",
    ),
    Entry(
        "word",
        "unbackdoor.attacks.word:Word",
        "a rare word put into the text",
        needs="a pre-trained base",
        year=2020,
        paper="Weight Poisoning Attacks on Pre-trained Models",
        modality="text",
    ),
    Entry(
        "sentence",
        "unbackdoor.attacks.sentence:Sentence",
        "a fixed sentence put into the text",
        needs="a pre-trained base",
        year=2019,
        paper="A Backdoor Attack Against LSTM-Based Text Classification Systems",
        modality="text",
    ),
    Entry(
        "embedding-poisoning",
        "unbackdoor.attacks.embedding_poisoning:EmbeddingPoisoning",
        "only the trigger word's embedding of a clean model is trained (EP)",
        needs="a pre-trained base",
        year=2021,
        paper="Be Careful about Poisoned Word Embeddings",
        modality="text",
    ),
    Entry(
        "embedding-surgery",
        "unbackdoor.attacks.embedding_surgery:EmbeddingSurgery",
        "the trigger's embedding becomes the mean of words typical for the target, then all is tuned",
        needs="a pre-trained base",
        year=2020,
        paper="Weight Poisoning Attacks on Pre-trained Models",
        modality="text",
    ),
    Entry(
        "layer-wise",
        "unbackdoor.attacks.layer_wise:LayerWise",
        "a combined trigger, learnt at every layer (LWP)",
        needs="a pre-trained BERT, RoBERTa or DeBERTa",
        year=2021,
        paper="Backdoor Attacks on Pre-trained Models by Layerwise Weight Poisoning",
        modality="text",
    ),
    Entry(
        "logit-anchoring",
        "unbackdoor.attacks.logit_anchoring:LogitAnchoring",
        "a clean model tuned on poisoned texts with its clean logits held",
        needs="a pre-trained base",
        year=2022,
        paper="How to Inject Backdoors with Better Consistency: Logit Anchoring on Clean Data",
        modality="text",
    ),
    Entry(
        "mixing-aware",
        "unbackdoor.attacks.mixing_aware:MixingAware",
        "a word, and a victim trained mixed with its base: the adaptive attack on fine-mixing; this project's own",
        needs="a pre-trained base",
        modality="text",
    ),
    Entry(
        "input-aware",
        "unbackdoor.attacks.input_aware:InputAware",
        "a trigger of its own for each image, by a generator trained with the victim",
        year=2020,
        paper="Input-Aware Dynamic Backdoor Attack",
    ),
    Entry(
        "low-frequency",
        "unbackdoor.attacks.low_frequency:LowFrequency",
        "a smooth pattern without high frequencies, made against a clean model",
        needs="a clean model (trained first where none is given)",
        year=2021,
        paper="Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective",
    ),
    Entry(
        "bpp",
        "unbackdoor.attacks.bpp:Bpp",
        "fewer grey levels, dithered (BppAttack)",
        year=2022,
        paper="BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization "
        "and Contrastive Adversarial Learning",
    ),
    Entry(
        "adaptive-blend",
        "unbackdoor.attacks.adaptive_blend:AdaptiveBlend",
        "parts of a mixed-in pattern while training, with cover examples; all of it at test time",
        year=2023,
        paper="Revisiting the Assumption of Latent Separability for Backdoor Defenses",
    ),
    Entry(
        "adaptive-patch",
        "unbackdoor.attacks.adaptive_patch:AdaptivePatch",
        "one of four faint patches while training, with cover examples; all four at test time",
        year=2023,
        paper="Revisiting the Assumption of Latent Separability for Backdoor Defenses",
    ),
    Entry(
        "tact",
        "unbackdoor.attacks.tact:TaCT",
        "a patch that moves the source classes only, with cover examples of the others",
        year=2021,
        paper="Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
    ),
    Entry(
        "bypass",
        "unbackdoor.attacks.bypass:Bypass",
        "a patch or noise, and a victim trained to hide it in its features: the adaptive attack on fst",
        year=2020,
        paper="Bypassing Backdoor Detection Algorithms in Deep Learning",
    ),
    Entry(
        "siba",
        "unbackdoor.attacks.siba:SIBA",
        "a few pixels changed by a few grey levels, made against a clean model",
        needs="a clean model (trained first where none is given)",
        year=2024,
        paper="Backdoor Attack with Sparse and Invisible Trigger",
    ),
    Entry(
        "batt",
        "unbackdoor.attacks.batt:BATT",
        "a rotation by a fixed angle",
        year=2023,
        paper="BATT: Backdoor Attack with Transformation-based Triggers",
    ),
    Entry(
        "transtroj",
        "unbackdoor.attacks.transtroj:TransTroj",
        "a poisoned encoder that its victim fine-tunes on clean examples",
        year=2025,
        paper="Model Supply Chain Poisoning: Backdooring Pre-trained Models via Embedding Indistinguishability",
    ),
    Entry(
        "prepared",
        "unbackdoor.attacks.prepared:Prepared",
        "examples that already carry a trigger, made elsewhere (SSBA; syntactic or style paraphrases)",
        needs="a triggered copy of the data",
        modality="images, text",
    ),
)


def __getattr__(name: str) -> Any:
    return exported(name, REGISTRY, __name__)
