"""Densely connected network (Huang et al. 2017), DenseNet-121 for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, relu


class Layer(nn.Module):
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3; `growth` new channels are appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(relu(self.bn2(self.conv1(relu(self.bn1(x))))))
        return torch.cat([x, y], 1)


class Transition(nn.Module):
    """BN-ReLU-conv1x1 to `outputs` channels, then 2x2 average pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(self.conv(relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """A 3x3 stem of `2 * growth` channels and dense groups with halving transitions between."""

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, layers: Sequence[int], growth: int
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < 8:
            raise ValueError(
                f"model: a DenseNet needs images of 8x8 or more, not {tuple(input_shape)}"
            )
        if growth < 1:
            raise ValueError(f"model.growth: must be at least 1, not {growth}")
        channels = 2 * growth
        self.stem = nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False)
        groups: list[nn.Module] = []
        for index, count in enumerate(layers):
            for _ in range(count):
                groups.append(Layer(channels, growth))
                channels += growth
            if index < len(layers) - 1:
                groups.append(Transition(channels, channels // 2))
                channels //= 2
        self.groups = nn.Sequential(*groups)
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` -> logits `(N, C)`."""
        x = relu(self.bn(self.groups(self.stem(x))))
        return self.classifier(adaptive_avg_pool2d(x, 1).flatten(1))


def densenet121(input_shape: Sequence[int], num_classes: int, *, growth: int = 32) -> nn.Module:
    """Groups of 6, 12, 24 and 16 layers: 6,956,298 parameters for 3x32x32, 10 classes."""
    return DenseNet(input_shape, num_classes, layers=(6, 12, 24, 16), growth=growth)
