"""Wide residual network (Zagoruyko and Komodakis 2016), pre-activation, for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu


class Block(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, plus the input (by a 1x1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float, late: bool) -> None:
        super().__init__()
        first, second = (1, stride) if late else (stride, 1)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, first, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, second, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        y = self.conv2(relu(self.bn2(self.dropout(self.conv1(active)))))
        return y + skip


class WideResNet(nn.Module):
    """Stem of 16 channels and three groups of `(depth - 4) / 6` blocks, 16, 32, 64 times `width`.

    Args:
        stride_in: which convolution of a block halves the image, `first` (5.243 GMAC for 28-10 on
            32x32) or `second` (5.951 GMAC, the variant behind the 3.6e17 FLOPs of Table 5.2).
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        depth: int = 28,
        width: int = 10,
        dropout: float = 0.0,
        stride_in: str = "second",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"model.depth: must be 6 n + 4 (10, 16, 22, 28, 40), not {depth}")
        if width < 1:
            raise ValueError(f"model.width: must be at least 1, not {width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout: must be in [0, 1), not {dropout}")
        if stride_in not in ("first", "second"):
            raise ValueError(f"model.stride_in: must be first or second, not {stride_in!r}")
        if len(input_shape) != 3:
            raise ValueError(f"model: a wide ResNet needs images, not {tuple(input_shape)}")
        late = stride_in == "second"
        blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(input_shape[0], 16, 3, 1, 1, bias=False)
        layers: list[nn.Module] = []
        inputs = 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range(blocks):
                stride = 2 if group > 0 and i == 0 else 1
                layers.append(Block(inputs, outputs, stride, dropout, late))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` -> logits `(N, C)`."""
        x = relu(self.bn(self.blocks(self.stem(x))))
        return self.classifier(adaptive_avg_pool2d(x, 1).flatten(1))
