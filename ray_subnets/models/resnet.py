"""Residual networks for 32x32 images (He et al. 2016): ResNet-18 and ResNet-56."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the input (by a 1x1 convolution where the shape changes), ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        skip = x if self.shortcut is None else self.shortcut(x)
        return relu(self.bn2(self.conv2(y)) + skip)


class ResNet(nn.Module):
    """A 3x3 stem without pooling, then groups of `blocks` blocks; each group after the first
    halves the image and doubles the channels.

    Args:
        width: channels of the first group.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, blocks: Sequence[int], width: int
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"model: a ResNet needs images, not {tuple(input_shape)}")
        if width < 1:
            raise ValueError(f"model.width: must be at least 1, not {width}")
        self.conv = nn.Conv2d(input_shape[0], width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        inputs = width
        for group, count in enumerate(blocks):
            outputs = width * 2**group
            for i in range(count):
                layers.append(Block(inputs, outputs, 2 if group > 0 and i == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` -> logits `(N, C)`."""
        x = self.blocks(relu(self.bn(self.conv(x))))
        return self.classifier(adaptive_avg_pool2d(x, 1).flatten(1))


def resnet18(input_shape: Sequence[int], num_classes: int, *, width: int = 64) -> nn.Module:
    """Four groups of two blocks: 11,173,962 parameters for 3x32x32 images and 10 classes."""
    return ResNet(input_shape, num_classes, blocks=(2, 2, 2, 2), width=width)


def resnet56(input_shape: Sequence[int], num_classes: int, *, width: int = 16) -> nn.Module:
    """Three groups of nine blocks: 855,770 parameters for 3x32x32 images and 10 classes.

    With 1x1 convolutions where the shape changes; the original pads with zeros there (853,018).
    """
    return ResNet(input_shape, num_classes, blocks=(9, 9, 9), width=width)
