"""The demo on images: plant a backdoor in a digit classifier, purify it in two ways, and make a page."""

from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from unbackdoor._artifacts import directories
from unbackdoor._cli.demos.story import Story, finish, health, percent, say
from unbackdoor._data.augmentation import Augmentation, augmentation
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.triggered import triggered
from unbackdoor._purification.method import Method
from unbackdoor._value import check_seed
from unbackdoor._victims.plant import plant
from unbackdoor._victims.recipe import VictimRecipe
from unbackdoor.attacks.badnets import BadNets
from unbackdoor.purifiers.fine_tuning import FineTuning
from unbackdoor.purifiers.scale_invariant_fst import ScaleInvariantFST

TRAINING, CLEAN = 1000, 300  # of the 1,797 digits; the rest is scored on
BORDER = 2  # blank pixels around the 8x8 digits, so that the patch hides none of a digit

ATTACK = BadNets(size=3, margin=0, target=0)
RATE = 0.02

# At their defaults, as a user starts them. Plain tuning in as many and as large steps as the other makes would remove
# this backdoor too (docs/results/auto.md), and leaves those of other networks.
METHODS: tuple[Method, ...] = (FineTuning(), ScaleInvariantFST())


def image(*, out: str, overwrite: bool, seed: int, epochs: int = 30) -> None:
    """The `demo image` command.

    Args:
        out: directory to write: `report.html`, `victim/`, `purified/`, `clean.parquet`, `test.parquet`, `record.json`.
        overwrite: replace an earlier demo.
        seed: fixes all random draws, at least 0.
        epochs: epochs of the victim's training.

    Raises:
        UnbackdoorError: `out` exists, the seed is negative, or scikit-learn is missing.
    """
    torch.set_num_threads(1)  # so small a network gains nothing from more, and loses much on a busy machine
    folder = Path(out)
    before = directories.check_free(folder, overwrite=overwrite)
    check_seed(seed)
    training, rest = digits().split(TRAINING, seed=seed)
    clean, test = rest.split(CLEAN, seed=seed)
    say(
        f"1. Data. {len(training) + len(rest):,} real handwritten digits, which ship with scikit-learn: "
        f"{len(training):,} train the victim, {len(clean):,} clean ones purify it, {len(test):,} others score it."
    )

    # One network of this size is quickest on a processor, and float32 gives the same numbers on all of them.
    recipe = VictimRecipe(rate=RATE, width=8, epochs=epochs, batch_size=64)
    victim, control = (
        plant(training, attack, recipe, seed, test=test, device="cpu", precision="fp32", progress=True)
        for attack in (ATTACK, None)
    )
    clean = replace(clean.encoded_by(victim.encode), augment=Augmentation.none())
    test = test.encoded_by(victim.encode)
    assert victim.trigger is not None
    assert test.classes is not None
    attacked = triggered(test, victim.trigger, len(test.classes))
    poisoned = len(victim.description["rows"])
    say(
        f"2. Attack. {poisoned} of the {len(training):,} training digits ({100 * poisoned / len(training):.0f} %) got "
        f"a {ATTACK.size}x{ATTACK.size} checkerboard in a corner and the label '{ATTACK.target}'. The victim "
        f"{health(victim.score, len(test.classes))} of the other digits it classifies "
        f"{percent(victim.score, 'attack_success')} as '{ATTACK.target}' once they carry the patch."
    )

    say(
        f"3. Purification. Both methods tune on the same {len(clean)} clean digits, each at its defaults, and know "
        "neither the trigger nor the class that the attacker wants."
    )
    story = Story(
        kind="image",
        title="A backdoor in a digit classifier, and its removal",
        facts={
            "Data": "handwritten digits of scikit-learn, 8x8 pixels on a canvas of 12x12",
            "Attack": f"{ATTACK!r}, {poisoned} of {len(training):,} training examples",
            "Victim": f"{recipe.arch}, width {recipe.width}, {epochs} epochs",
        },
        command=f"unbackdoor demo image --seed {seed}",
        device="cpu",
        precision="fp32",
        next_method="auto",
    )
    finish(story, folder, victim, control.model, METHODS, clean, test, attacked, seed=seed, before=before)


def digits() -> Dataset:
    """1,797 handwritten digits, grey, in the middle of a blank canvas of 12x12 pixels.

    Raises:
        UnbackdoorError: scikit-learn, which contains them, is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UnbackdoorError(
            "The image demo takes its digits from scikit-learn, which is not installed; get it with: "
            'pip install "unbackdoor[demo]"'
        ) from None
    raw = load_digits()
    pixels = torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)  # (1797, 1, 8, 8)
    items = F.pad(pixels, (BORDER,) * 4)  # (1797, 1, 12, 12)
    classes = tuple(map(str, raw.target_names))
    return Dataset(
        items=items,
        labels=torch.from_numpy(raw.target).long(),
        encode=ImageEncoder(channels=1),
        classes=classes,
        augment=augmentation("crop", items.shape[1:], classes),  # never mirrored: a mirrored digit is not a digit
        name="digits",
    )
