"""Backbones of the small experiments: an MLP, the CIFAR ResNets, and Wide ResNets."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.utils.checks import argument_error


def mlp(
    num_inputs: int, hidden: Sequence[int], num_classes: int, dtype: torch.dtype = torch.float32
) -> tuple[nn.Sequential, nn.Linear]:
    """Backbone (N, num_inputs) → (N, hidden[-1]) of Linear and ReLU layers, and its head."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = num_inputs
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers).to(dtype), nn.Linear(width, num_classes).to(dtype)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm; the shortcut is the identity, or strided and zero-padded
    (option A of He et al., as in the CIFAR ResNets)."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if width_in == width else 2
        self.extra = (width - width_in) // 2
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, width_in, H, W) → (N, width, H / stride, W / stride)."""
        hidden = self.norm1(self.conv1(inputs)).relu()
        hidden = self.norm2(self.conv2(hidden))
        shortcut = inputs
        if self.stride > 1:
            pads = (0, 0, 0, 0, self.extra, self.extra)
            shortcut = F.pad(inputs[:, :, :: self.stride, :: self.stride], pads)
        return (hidden + shortcut).relu()


def resnet32() -> nn.Sequential:
    """The CIFAR ResNet-32: images (N, 3, H, W) → features (N, 64), 0.46 million parameters."""
    return cifar_resnet(32)


def cifar_resnet(depth: int, width: int = 16) -> nn.Sequential:
    """A CIFAR ResNet of depth 6n + 2 (He et al. 2016, section 4.2) without its head.

    Images (N, 3, H, W) → features (N, 4 width); initialised as there (He et al. 2015).
    """
    first = nn.Conv2d(3, width, 3, 1, 1, bias=False)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in (width, 2 * width, 4 * width):
        for _ in range(_blocks(depth, 2, 32)):
            layers.append(BasicBlock(before, stage))
            before = stage
    return _pooled(layers)


def _blocks(depth: int, rest: int, usual: int) -> int:
    """n of a depth 6n + rest: the blocks of each of three stages."""
    blocks, remainder = divmod(depth - rest, 6)
    if remainder or blocks < 1:
        expected = f"6n + {rest} with n of at least 1"
        raise argument_error("depth", expected, depth, f"{usual} is usual")
    return blocks


def _pooled(layers: Sequence[nn.Module]) -> nn.Sequential:
    """These layers and the mean over the picture; convolutions initialised by He et al., 2015."""
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net


class WideBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions; a 1×1 convolution as the shortcut
    where the width changes (Zagoruyko and Komodakis 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = (
            None if width_in == width else nn.Conv2d(width_in, width, 1, stride, bias=False)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, width_in, H, W) → (N, width, H / stride, W / stride)."""
        active = self.norm1(inputs).relu()
        shortcut = inputs if self.shortcut is None else self.shortcut(active)
        return shortcut + self.conv2(self.norm2(self.conv1(active)).relu())


def wide_resnet(depth: int = 28, factor: int = 10) -> nn.Sequential:
    """A Wide ResNet of depth 6n + 4 without its head.

    Images (N, 3, H, W) → features (N, 64 factor). The default is WRN-28-10, with 36.5 million
    parameters.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    before = 16
    for stage in range(3):
        width = 16 * factor * 2**stage
        for block in range(_blocks(depth, 4, 28)):
            layers.append(WideBlock(before, width, 2 if stage and not block else 1))
            before = width
    return _pooled([*layers, nn.BatchNorm2d(before), nn.ReLU()])
