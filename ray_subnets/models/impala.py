"""The residual network of IMPALA (Espeholt et al. 2018), as used on ProcGen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu


class Residual(nn.Module):
    """ReLU-conv-ReLU-conv, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(relu(self.conv1(relu(x))))


class Stage(nn.Module):
    """conv, 3x3 max pooling with stride 2, two residual blocks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.residual1 = Residual(outputs)
        self.residual2 = Residual(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool2d(self.conv(x), 3, stride=2, padding=1)
        return self.residual2(self.residual1(x))


class Impala(nn.Module):
    """One stage per entry of `channels`, a hidden linear layer, a linear head.

    Args:
        channels: of the stages; the dissertation's policies use 32, 64, 128 (Table 4.2).
        hidden: units of the layer before the head.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        channels: Sequence[int] = (32, 64, 128),
        hidden: int = 256,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"model: IMPALA needs images, not {tuple(input_shape)}")
        if not channels or min(channels) < 1 or hidden < 1:
            raise ValueError("model.channels, model.hidden: must be positive")
        inputs, height, width = input_shape
        stages: list[nn.Module] = []
        for outputs in channels:
            stages.append(Stage(inputs, outputs))
            inputs, height, width = outputs, (height + 1) // 2, (width + 1) // 2
        self.stages = nn.Sequential(*stages)
        self.hidden = nn.Linear(inputs * height * width, hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` -> what the head sees, `(N, hidden)`."""
        x = relu(self.stages(x)).flatten(1)
        return relu(self.hidden(x))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` -> logits `(N, C)`."""
        return self.classifier(self.features(x))
