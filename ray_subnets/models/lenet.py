"""LeNet in the dissertation's three sizes (section 5.3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu


class LeNet(nn.Module):
    """Two 5x5 convolutions without padding, 2x2 max pooling, two hidden linear layers.

    Widths 16, 32, 256, 128 times `width`. For 3x32x32 images and 10 classes that is 253,290
    (width 1, LeNet-S), 1,007,306 (2, LeNet-M) and 4,017,546 (4, LeNet-L) parameters.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, width: int = 1) -> None:
        super().__init__()
        channels, *size = input_shape
        after = [((side - 4) // 2 - 4) // 2 for side in size]
        if len(size) != 2 or min(after) < 1:
            raise ValueError(
                f"model: LeNet needs images of 16x16 or more, not {tuple(input_shape)}"
            )
        self.conv1 = nn.Conv2d(channels, 16 * width, 5)
        self.conv2 = nn.Conv2d(16 * width, 32 * width, 5)
        self.fc1 = nn.Linear(32 * width * after[0] * after[1], 256 * width)
        self.fc2 = nn.Linear(256 * width, 128 * width)
        self.classifier = nn.Linear(128 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` -> logits `(N, C)`."""
        # Pooling first: the same values and gradients, a quarter of the ReLUs.
        x = relu(max_pool2d(self.conv1(x), 2))
        x = relu(max_pool2d(self.conv2(x), 2))
        x = relu(self.fc1(x.flatten(1)))
        x = relu(self.fc2(x))
        return self.classifier(x)


def lenet_s(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """LeNet-S: 16 and 32 channels, 256 and 128 units."""
    return LeNet(input_shape, num_classes, width=1)


def lenet_m(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """LeNet-M: LeNet-S with every width doubled."""
    return LeNet(input_shape, num_classes, width=2)


def lenet_l(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """LeNet-L: LeNet-M with every width doubled."""
    return LeNet(input_shape, num_classes, width=4)
