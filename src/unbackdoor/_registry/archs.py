"""The architectures of victims: names, classes and facts."""

from unbackdoor._registry.entries import Entry

REGISTRY = (
    Entry(
        "resnet18",
        "unbackdoor.archs:resnet18",
        "ResNet-18 with a stem for 32x32 images; width 64 as in the papers, 16 to train on two cores",
        year=2015,
        paper="Deep Residual Learning for Image Recognition",
    ),
    Entry(
        "preact-resnet18",
        "unbackdoor.archs:preact_resnet18",
        "the same with normalisation before each convolution",
        year=2016,
        paper="Identity Mappings in Deep Residual Networks",
    ),
    Entry(
        "wrn16",
        "unbackdoor.archs:wrn16",
        "WRN-16-1 at width 16: the same in three stages of two blocks, small enough for two cores",
        year=2016,
        paper="Wide Residual Networks",
    ),
    Entry(
        "vit",
        "unbackdoor.archs:vit",
        "a Vision Transformer of 6 layers on about 8x8 patches; width 64 gives 192 dimensions",
        year=2020,
        paper="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    ),
)
