"""The attacks: what is registered, and the classes, imported on first use."""

from typing import TYPE_CHECKING, Any

from unbackdoor._registry import Entry, exported

if TYPE_CHECKING:
    from unbackdoor.attacks.badnets import BadNets as BadNets
    from unbackdoor.attacks.blended import Blended as Blended
    from unbackdoor.attacks.embedding_poisoning import EmbeddingPoisoning as EmbeddingPoisoning
    from unbackdoor.attacks.embedding_surgery import EmbeddingSurgery as EmbeddingSurgery
    from unbackdoor.attacks.label_consistent import LabelConsistent as LabelConsistent
    from unbackdoor.attacks.layer_wise import LayerWise as LayerWise
    from unbackdoor.attacks.logit_anchoring import LogitAnchoring as LogitAnchoring
    from unbackdoor.attacks.prepared import Prepared as Prepared
    from unbackdoor.attacks.sentence import Sentence as Sentence
    from unbackdoor.attacks.sig import SIG as SIG
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
        "prepared",
        "unbackdoor.attacks.prepared:Prepared",
        "examples that already carry a trigger, made elsewhere (SSBA; syntactic or style paraphrases)",
        needs="a triggered copy of the data",
        modality="images, text",
    ),
)


def __getattr__(name: str) -> Any:
    return exported(name, REGISTRY, __name__)
