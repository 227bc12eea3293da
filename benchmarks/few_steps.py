"""How much of a backdoor is left if few clean pictures make few steps, and by which learning rate it goes.

    export UNBACKDOOR_DATA=$(realpath ../shared/data) ZOO=/tmp/zoo
    python benchmarks/zoo_data.py $ZOO
    python benchmarks/few_steps.py $ZOO [digits-patch ...]

300 clean pictures purify each victim; the settings of the first shift of `auto` were chosen on them. Seed of the
purification 0, float32, one thread; about 2 minutes a victim.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

import unbackdoor as ub
from unbackdoor import attacks, purifiers
from unbackdoor._cli.demos.images import digits
from unbackdoor._data.augmentation import Augmentation
from unbackdoor._victims.plant import plant
from unbackdoor._victims.recipe import VictimRecipe

CLEAN, TEST = 300, 1000
VICTIMS = {  # data, attack, poison rate, seed of the data and of the victim
    "digits-patch": ("digits", attacks.BadNets(size=3, margin=0, target=1), 0.02, 1),
    "digits-blended": ("digits", attacks.Blended(target=4), 0.1, 3),
    "mnist-patch": ("mnist", attacks.BadNets(size=3, margin=1, target=3), 0.05, 4),
    "fashion-patch": ("fashion", attacks.BadNets(size=3, margin=0, target=2), 0.05, 5),
    "fashion-blended": ("fashion", attacks.Blended(target=6), 0.05, 6),
}
SHIFT = purifiers.ScaleInvariantFST(strength=1)
METHODS = {
    "defaults": SHIFT,
    "10 passes (version 1)": replace(SHIFT, epochs=10),
    "alpha 10": replace(SHIFT, alpha=10.0),
    "rate 0.03": replace(SHIFT, learning_rate=0.03),
    "rate 0.03, batches of 12": replace(SHIFT, learning_rate=0.03, batch_size=12),
    "alpha 10, rate 0.03, batches of 12": replace(SHIFT, alpha=10.0, learning_rate=0.03, batch_size=12),
    "rate 0.03, batches of 12, 10 passes": replace(SHIFT, learning_rate=0.03, batch_size=12, epochs=10),
    "`fst`": purifiers.FST(),
    "`adaptive-unlearning`": purifiers.AdaptiveUnlearning(),
}


def parts(name: str, folder: Path, seed: int) -> tuple[ub.Dataset, ub.Dataset, ub.Dataset]:
    """The training pictures, the clean ones, and others to score."""
    if name == "digits":
        training, rest = digits().split(1000, seed=seed)
        return training, *rest.split(CLEAN, seed=seed)
    clean, _ = ub.Dataset.load(folder / f"{name}-b.parquet").split(CLEAN, seed=seed)
    test, _ = ub.Dataset.load(folder / f"{name}-test.parquet").split(TEST, seed=0)
    return ub.Dataset.load(folder / f"{name}-a.parquet"), clean, test


def measured(name: str, folder: Path) -> None:
    """Plant a victim, purify it by each setting, and print a row for each."""
    data, attack, rate, seed = VICTIMS[name]
    training, clean, test = parts(data, folder, seed)
    recipe = VictimRecipe(rate=rate, width=8, epochs=30 if data == "digits" else 12, batch_size=64)
    victim = plant(training, attack, recipe, seed, test=test, device="cpu", precision="fp32")
    clean = replace(clean.encoded_by(victim.encode), augment=Augmentation.none())
    test = test.encoded_by(victim.encode)
    assert victim.trigger is not None
    for setting, method in {"before any method": None, **METHODS}.items():
        model = victim.model
        if method is not None:
            model = ub.purify(model, clean, method, seed=0, device="cpu", precision="fp32").model
        score = ub.evaluate(model, test, attack=victim.trigger, device="cpu", precision="fp32")
        assert score.attack_success is not None
        shares = f"{100 * score.clean_accuracy.value:.1f} | {100 * score.attack_success.value:.1f}"
        print(f"| {name} | {setting} | {shares} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| victim | setting | clean accuracy | attack success |\n| --- | --- | --- | --- |")
    for chosen in sys.argv[2:] or VICTIMS:
        measured(chosen, Path(sys.argv[1]))
