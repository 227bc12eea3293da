"""Small victim networks, saved as Hugging Face directories.

`AutoModelForImageClassification` knows the residual ones once `unbackdoor.archs.register()` has run.
"""

from typing import Any

from unbackdoor._errors import UnbackdoorError
from unbackdoor._registry.archs import REGISTRY as REGISTRY
from unbackdoor._registry.entries import find


def register() -> None:
    """Make the project's own networks known to the transformers Auto classes. Calling it again changes nothing."""
    from transformers import AutoConfig, AutoModelForImageClassification

    from unbackdoor.archs._resnet import SmallResNetConfig, SmallResNetForImageClassification

    AutoConfig.register(SmallResNetConfig.model_type, SmallResNetConfig, exist_ok=True)
    AutoModelForImageClassification.register(SmallResNetConfig, SmallResNetForImageClassification, exist_ok=True)


def build(name: str, *, classes: list[str], channels: int, image_size: int, width: int = 64) -> Any:
    """Returns a network with random weights.

    Args:
        name: name in the registry.
        classes: class names in label order.
        channels: 1 or 3.
        image_size: side of the images in pixels.
        width: channels of the first stage.

    Raises:
        UnbackdoorError: the name is unknown, or the width is below 1.
    """
    if width < 1:
        raise UnbackdoorError(f"`width` must be at least 1, got {width}.")
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: index for index, label in enumerate(classes)}}
    return find(name, REGISTRY, "architecture", "archs").resolve()(
        width=width, num_channels=channels, image_size=image_size, **labels
    )


def resnet18(**options: Any) -> Any:
    """ResNet-18; see `SmallResNetConfig` for the options."""
    from unbackdoor.archs._resnet import SmallResNetConfig, SmallResNetForImageClassification

    register()
    return SmallResNetForImageClassification(SmallResNetConfig(**options))


def preact_resnet18(**options: Any) -> Any:
    """PreAct-ResNet-18; see `SmallResNetConfig` for the options."""
    return resnet18(preact=True, **options)


def wrn16(**options: Any) -> Any:
    """WRN-16-1 at width 16; larger widths also widen the stem, unlike WRN-16-k."""
    return preact_resnet18(depths=(2, 2, 2), **options)


def vit(*, width: int = 64, image_size: int = 32, **options: Any) -> Any:
    """A small Vision Transformer: 6 layers, heads of 32 dimensions or less, patches of about an eighth of the side.

    They cover the whole image, so that a trigger at its border is seen.

    Attention is the plain product: of 65 tokens, in bfloat16 on a processor, it trains in three fifths of the time of
    torch's fused one (width 64, 5.5 against 8.9 ms an image on one thread).

    Raises:
        UnbackdoorError: no patch divides the side into 4 to 20.
    """
    from transformers import ViTConfig, ViTForImageClassification

    patches = [size for size in range(1, image_size + 1) if image_size % size == 0 and 4 <= image_size // size <= 20]
    if not patches:
        raise UnbackdoorError(
            f"`arch='vit'` needs images whose side patches divide into 4 to 20, got {image_size}. Resize them, to "
            f"{-(-image_size // 8) * 8} say, or take `arch='resnet18'`."
        )

    hidden = 3 * width
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=6,
            num_attention_heads=3,
            image_size=image_size,
            patch_size=min(patches, key=lambda size: abs(size - image_size / 8)),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
            initializer_range=hidden**-0.5,  # the usual 0.02 is for 768 dimensions: with 24 to 96 it hardly learns
            **options,
        )
    )
