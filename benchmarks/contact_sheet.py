"""A contact sheet: each image trigger on a few CIFAR-10 pictures, and its change, amplified; drawn from the code.

    python benchmarks/contact_sheet.py TRAIN.parquet --out docs/results/triggers.png
    python benchmarks/contact_sheet.py TRAIN.parquet --victims RUNS --out triggers.png

Learnt triggers come from victims: each folder under RUNS with an attack.json. Without one, those that are made against
a clean model get a small one, and those that learn with the victim a small victim, both trained here for two passes
over the first 2,000 pictures: enough to show the triggers, not their strength.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unbackdoor import Dataset, VictimRecipe, plant
from unbackdoor._poisoning.abilities import is_learnt, needs_surrogate
from unbackdoor._poisoning.attack_file import load_trigger
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._registry.entries import name_of
from unbackdoor.attacks import REGISTRY

ZOOM, GAP, LABEL = 3, 4, 118
PICTURES = 4
NOT_DRAWN = ("prepared",)


def triggers(data: Dataset, victims: Path | None, count: int) -> dict[str, Trigger]:
    """Each image attack's trigger, by its name on the command line."""
    found = {}
    for path in sorted(victims.glob("*/attack.json")) if victims else ():
        if json.loads(path.read_text())["attack"]["name"] == "none":
            continue
        trigger = load_trigger(path)
        found[name_of(trigger.attack, REGISTRY)] = trigger
    part, test = data.select(range(count)), data.select(range(count, count + 200))
    surrogate = None
    for entry in REGISTRY:
        if entry.modality != ("images",) or entry.name in (*NOT_DRAWN, *found):
            continue
        attack = entry.resolve()()
        if not is_learnt(attack):
            found[entry.name] = Trigger.of(attack, data)
            continue
        recipe = VictimRecipe(width=8, epochs=2, rate=0.1)
        given = {}
        if needs_surrogate(attack):
            surrogate = surrogate or plant(part, None, recipe, test=test)
            given = {"surrogate": surrogate.model, "surrogate_encode": surrogate.encode}
        made = plant(part, attack, recipe, test=test, **given).trigger
        assert made is not None
        found[entry.name] = made
    return found


def sheet(pictures: Tensor, made: dict[str, Trigger]) -> Image.Image:
    """A row per trigger: the name, the pictures with it, the change, and the factor of its amplification."""
    names = [entry.name for entry in REGISTRY if entry.name in made]
    side = pictures.shape[-1] * ZOOM
    columns = 2 * len(pictures)
    width = LABEL + columns * (side + GAP) + 3 * GAP
    canvas = Image.new("RGB", (width, 24 + (len(names) + 1) * (side + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    middle = LABEL + len(pictures) * (side + GAP) + 3 * GAP
    draw.text((LABEL, 4), "with the trigger, rounded to 8 bits", "black", font)
    draw.text((middle, 4), "the change, amplified as the left column says; grey is none", "black", font)
    for row, name in enumerate(["no trigger", *names]):
        top = 24 + row * (side + GAP)
        shown = pictures if row == 0 else made[name].stamp(pictures)
        change = shown.float() - pictures.float()
        largest = float(change.abs().max())
        factor = max(1, int(127 / largest)) if largest else 1
        caption = name if row == 0 else f"{name}\nup to {largest:.0f} of 255\nchange x {factor}"
        draw.multiline_text((4, top + side // 3), caption, "black", font)
        residual = (127.5 + factor * change).clamp(0, 255).to(torch.uint8)
        for column, picture in enumerate([*shown, *residual]):
            left = (LABEL if column < len(pictures) else middle - len(pictures) * (side + GAP)) + column * (side + GAP)
            drawn = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
            canvas.paste(drawn.resize((side, side), Image.Resampling.NEAREST), (left, top))
    return canvas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--victims", type=Path)
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--out", type=Path, default=Path("triggers.png"))
    given = parser.parse_args()
    loaded = Dataset.load(given.data)
    chosen = torch.stack([torch.nonzero(loaded.labels == label)[0, 0] for label in (1, 4, 7, 8)])[:PICTURES]
    picture = sheet(loaded.pixels[chosen], triggers(loaded, given.victims, given.count))
    picture.quantize(256, dither=Image.Dither.NONE).save(given.out, optimize=True)
    print(f"Wrote {given.out}, {given.out.stat().st_size / 1000:.0f} kB.")
