"""ResNet-18 and PreAct-ResNet-18 with a stem for small pictures, as Hugging Face models.

The stem is one 3x3 convolution without pooling, as the literature uses for 32x32 images; `width` is the number of
channels of the first stage (64 in the papers, 16 trains on two cores).

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385 He et al., "Identity
Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class SmallResNetConfig(PretrainedConfig):
    """The shape of a small-picture ResNet.

    Args:
        width: channels of the first of the four stages; each later stage has twice as many. At least 1.
        depths: residual blocks per stage.
        preact: normalise before each convolution (PreAct-ResNet) instead of after.
        num_channels: 3 for colour, 1 for grey.
        image_size: side of the square input, in pixels; the network itself takes any size.
    """

    model_type = "unbackdoor-resnet"

    def __init__(
        self,
        width: int = 64,
        depths: tuple[int, ...] = (2, 2, 2, 2),
        preact: bool = False,
        num_channels: int = 3,
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.width = width
        self.depths = list(depths)
        self.preact = preact
        self.num_channels = num_channels
        self.image_size = image_size
        super().__init__(**kwargs)


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions next to an identity, or next to a 1x1 projection if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _convolution(outputs, outputs, 3, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the features of the next block from (batch, channels, height, width)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        activated: Tensor = F.relu(out + self.shortcut(x))
        return activated


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after its normalisation; the projection sees the normalised input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _convolution(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _convolution(outputs, outputs, 3, 1)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the features of the next block from (batch, channels, height, width)."""
        out = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        added: Tensor = out + identity
        return added


class SmallResNetForImageClassification(PreTrainedModel):
    """A four-stage residual network with one linear layer, `fc`, on globally averaged features."""

    config_class = SmallResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SmallResNetConfig) -> None:
        super().__init__(config)
        self.conv1 = _convolution(config.num_channels, config.width, 3, 1)
        self.bn1 = nn.Identity() if config.preact else nn.BatchNorm2d(config.width)
        block = PreActBlock if config.preact else BasicBlock
        channels = config.width
        stages = []
        for index, depth in enumerate(config.depths):
            outputs = config.width * 2**index
            strides = [1 if index == 0 else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(block(channels, outputs, stride))
                channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels) if config.preact else nn.Identity()
        self.fc = nn.Linear(channels, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            module.reset_running_stats()
        elif isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify a batch.

        Args:
            pixel_values: normalised pixels, (batch, channels, height, width).
            labels: class indices, (batch,); with them the output carries the mean cross-entropy.
        """
        x = self.bn1(self.conv1(pixel_values))
        if not self.config.preact:
            x = F.relu(x)
        x = self.stages(x)  # (batch, 8 * width, height / 8, width / 8)
        if self.config.preact:
            x = F.relu(self.norm(x))
        logits = self.fc(x.mean(dim=(2, 3)))  # (batch, classes)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
