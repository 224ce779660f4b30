"""SE-ResNeXt-50 32x4d written by hand as PyTorch users write it: what the translated graph has to keep up with.

The same network as the declared graph (BatchNorm on the raw pixels, dense layers with bias in the SE blocks), with the
habits of timm and torchvision: in-place activations and sums, `nn.BatchNorm2d`, no copy that is not needed. Not
imported by anything but benchmarks.
"""

from __future__ import annotations

from torch import Tensor, nn

UNITS, FILTERS, GROUPS, REDUCTION = (3, 4, 6, 3), (64, 256, 512, 1024, 2048), 32, 16
EPS, MOMENTUM = 2e-5, 0.1


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM)


class SqueezeExcite(nn.Module):
    """Rescale channels by what their means say."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Linear(channels, channels // REDUCTION)
        self.relu = nn.ReLU(inplace=True)
        self.expand = nn.Linear(channels // REDUCTION, channels)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gate(self.expand(self.relu(self.reduce(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


class Unit(nn.Module):
    """1 x 1, grouped 3 x 3, 1 x 1, SE, plus the shortcut."""

    def __init__(self, before: int, filters: int, stride: int):
        super().__init__()
        width = filters // 2
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=GROUPS, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, filters, 1, bias=False)
        self.bn3 = norm(filters)
        self.se = SqueezeExcite(filters)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if before != filters:
            self.downsample = nn.Sequential(nn.Conv2d(before, filters, 1, stride, bias=False), norm(filters))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.se(self.bn3(self.conv3(x)))
        x += shortcut
        return self.relu(x)


class SEResNeXt50(nn.Module):
    """Raw 0-255 images (N, 3, H, W) -> logits (N, classes)."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.bn_data = norm(3)
        self.conv0 = nn.Conv2d(3, FILTERS[0], 7, 2, 3, bias=False)
        self.bn0 = norm(FILTERS[0])
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        units, before = [], FILTERS[0]
        for stage, (count, filters) in enumerate(zip(UNITS, FILTERS[1:])):
            for index in range(count):
                units.append(Unit(before, filters, 2 if stage and not index else 1))
                before = filters
        self.units = nn.Sequential(*units)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn0(self.conv0(self.bn_data(x)))))
        return self.fc(self.units(x).mean((2, 3)))
