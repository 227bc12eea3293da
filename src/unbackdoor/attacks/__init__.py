"""The attacks: what is registered, and the classes, imported on first use."""

from typing import TYPE_CHECKING, Any

from unbackdoor._registry import Entry, exported

if TYPE_CHECKING:
    from unbackdoor.attacks.badnets import BadNets as BadNets
    from unbackdoor.attacks.blended import Blended as Blended
    from unbackdoor.attacks.label_consistent import LabelConsistent as LabelConsistent
    from unbackdoor.attacks.prepared import Prepared as Prepared
    from unbackdoor.attacks.sig import SIG as SIG
    from unbackdoor.attacks.wanet import WaNet as WaNet

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
        "prepared",
        "unbackdoor.attacks.prepared:Prepared",
        "pictures that already carry a trigger (SSBA, say)",
        needs="a triggered copy of the data",
    ),
)


def __getattr__(name: str) -> Any:
    return exported(name, REGISTRY, __name__)
