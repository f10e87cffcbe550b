"""Small convolutional networks whose layers have the names of torchvision, timm and others."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(c: int, o: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, o, kernel, stride, kernel // 2, groups=groups, bias=False)


def downsample(c: int, o: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and c == o:
        return None
    return nn.Sequential(conv(c, o, 1, stride), nn.BatchNorm2d(o))


class Basic(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(c, o, 3, stride), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(o, o, 3), nn.BatchNorm2d(o)
        self.downsample = downsample(c, o, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """torchvision's Bottleneck; ResNeXt's with groups."""

    groups = 1

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        inner = 16
        self.conv1, self.bn1 = conv(c, inner, 1), nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride, self.groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, o, 1), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample(c, o, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNeXt(Bottleneck):
    groups = 4


class SqueezeExcite(nn.Module):
    """timm's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(channels, 4, 1), nn.ReLU(inplace=True)
        self.conv_expand, self.gate = nn.Conv2d(4, channels, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * self.gate(gate)


class TimmBasic(nn.Module):
    """timm's BasicBlock with squeeze-and-excite behind the second convolution."""

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(c, o, 3, stride), nn.BatchNorm2d(o)
        self.drop_block, self.act1, self.aa = nn.Identity(), nn.ReLU(inplace=True), nn.Identity()
        self.conv2, self.bn2 = conv(o, o, 3), nn.BatchNorm2d(o)
        self.se, self.drop_path, self.act2 = SqueezeExcite(o), None, nn.ReLU(inplace=True)
        self.downsample = downsample(c, o, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        x = self.se(self.bn2(self.conv2(x)))
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


class Cifar(nn.Module):
    """A plain block whose activations are functions."""

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(c, o, 3, stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o, 3), nn.BatchNorm2d(o)
        self.shortcut = downsample(c, o, stride) or nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class PreBasic(nn.Module):
    """Pre-activation (He et al. 2016), with the shortcut behind the first activation."""

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), conv(c, o, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv(o, o, 3)
        self.shortcut = conv(c, o, 1, stride) if stride > 1 or c != o else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PreBottleneck(nn.Module):
    """timm's PreActBottleneck with batch norm."""

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        self.downsample = conv(c, o, 1, stride) if stride > 1 or c != o else None
        self.norm1, self.conv1 = nn.BatchNorm2d(c), conv(c, 16, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), conv(16, 16, 3, stride)
        self.norm3, self.conv3 = nn.BatchNorm2d(16), conv(16, o, 1)
        self.act, self.drop_path = nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        preact = self.act(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(preact)
        out = self.conv2(self.act(self.norm2(self.conv1(preact))))
        out = self.conv3(self.act(self.norm3(out)))
        return self.drop_path(out) + shortcut


class NormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: nn.Module | None = None):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        return self.act(self.drop(super().forward(x)))


class Inverted(nn.Module):
    """timm's InvertedResidual."""

    gated = False

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        wide = 2 * c
        self.conv_pw, self.bn1 = conv(c, wide, 1), NormAct(wide, nn.ReLU6(True))
        self.conv_dw, self.bn2 = conv(wide, wide, 3, stride, wide), NormAct(wide, nn.SiLU(True))
        self.se = SqueezeExcite(wide) if self.gated else nn.Identity()
        self.conv_pwl, self.bn3 = conv(wide, o, 1), NormAct(o)
        self.has_skip, self.drop_path = stride == 1 and c == o, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.se(self.bn2(self.conv_dw(x)))
        x = self.bn3(self.conv_pwl(x))
        return self.drop_path(x) + shortcut if self.has_skip else x


class GatedInverted(Inverted):
    gated = True


class ActivatedInverted(Inverted):
    """Its last batch norm has an activation inside."""

    def __init__(self, c: int, o: int, stride: int):
        super().__init__(c, o, stride)
        self.bn3 = NormAct(o, nn.ReLU(True))


class Gate(nn.Module):
    """torchvision's SqueezeExcitation."""

    def __init__(self, channels: int):
        super().__init__()
        self.avgpool, self.fc1 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1)
        self.activation, self.fc2 = nn.SiLU(), nn.Conv2d(4, channels, 1)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class MBConv(nn.Module):
    """torchvision's MBConv of EfficientNet: its layers lie in one list."""

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        wide = 2 * c

        def unit(i: int, o: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
            return nn.Sequential(
                conv(i, o, kernel, stride, groups), nn.BatchNorm2d(o), nn.SiLU(inplace=True)
            )

        self.use_res_connect = stride == 1 and c == o
        self.block = nn.Sequential(
            unit(c, wide, 1), unit(wide, wide, 3, stride, wide), Gate(wide), unit(wide, o, 1)[:2]
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        if self.use_res_connect:
            out += x
        return out


class MobileNet(nn.Module):
    """torchvision's InvertedResidual of MobileNetV2."""

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        wide = 2 * c
        self.use_res_connect = stride == 1 and c == o
        self.conv = nn.Sequential(
            nn.Sequential(conv(c, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6(True)),
            nn.Sequential(conv(wide, wide, 3, stride, wide), nn.BatchNorm2d(wide), nn.ReLU6(True)),
            conv(wide, o, 1),
            nn.BatchNorm2d(o),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class Net(nn.Module):
    """Stem, two stages of two blocks, pooling, classifier."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], width: int = 16):
        super().__init__()
        self.conv1, self.bn1 = conv(3, width, 3), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(block(width, width, 1), block(width, width, 1))
        self.layer2 = nn.Sequential(block(width, 24, 2), block(24, 24, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


def transformers_resnet(kind: str) -> nn.Module:
    """transformers' ResNetForImageClassification; "basic" or "bottleneck"."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = [16, 24] if kind == "basic" else [64, 96]
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=sizes, depths=[2, 2], layer_type=kind, num_labels=5
    )
    return Logits(ResNetForImageClassification(config))


class Logits(nn.Module):
    """A classifier of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


_BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1")


def _everywhere(*layers: str) -> list[str]:
    return [f"{block}.{layer}" for block in _BLOCKS for layer in layers]


def _in_transformers(*layers: int) -> list[str]:
    return [
        f"model.resnet.encoder.stages.{stage}.layers.{block}.layer.{layer}.convolution"
        for stage in range(2)
        for block in range(2)
        for layer in layers
    ]


# By name: the network, and the names of its sites.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "torchvision-basic": (lambda: Net(Basic), _everywhere("conv1")),
    "torchvision-bottleneck": (lambda: Net(Bottleneck), _everywhere("conv1", "conv2")),
    "torchvision-resnext": (lambda: Net(ResNeXt), _everywhere("conv2")),
    "timm-se-basic": (lambda: Net(TimmBasic), _everywhere("conv1")),
    "cifar": (lambda: Net(Cifar), _everywhere("conv1")),
    "pre-activation": (lambda: Net(PreBasic), _everywhere("conv1")),
    "timm-pre-bottleneck": (lambda: Net(PreBottleneck), _everywhere("conv1", "conv2")),
    "timm-inverted": (lambda: Net(Inverted), _everywhere("conv_pw")),
    "activated-inverted": (lambda: Net(ActivatedInverted), _everywhere("conv_pw")),
    "timm-inverted-se": (lambda: Net(GatedInverted), _everywhere("conv_pw")),
    "torchvision-mbconv": (lambda: Net(MBConv), _everywhere("block.0.0")),
    "torchvision-mobilenet": (lambda: Net(MobileNet), _everywhere("conv.0.0")),
    "transformers-basic": (lambda: transformers_resnet("basic"), _in_transformers(0)),
    "transformers-bottleneck": (lambda: transformers_resnet("bottleneck"), _in_transformers(0, 1)),
}


def network(name: str, seed: int = 0) -> nn.Module:
    """One of `NETWORKS` in evaluation mode, with batch norms that are not the identity."""
    torch.manual_seed(seed)
    return randomised(NETWORKS[name][0]())


def randomised(model: nn.Module) -> nn.Module:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model.eval()


def images(count: int = 4, rows: int = 5, seed: int = 0, size: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, size, size, generator=generator) for _ in range(count)]


class ConvNormAct(nn.Module):
    """timm's."""

    def __init__(self, c: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv, self.bn = conv(c, o, kernel, stride, groups), NormAct(o, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class RegNetBlock(nn.Module):
    """timm's Bottleneck of RegNet."""

    def __init__(self, c: int, o: int, stride: int, groups: int = 2):
        super().__init__()
        self.conv1 = ConvNormAct(c, o)
        self.conv2 = ConvNormAct(o, o, 3, stride, groups)
        self.se, self.conv3 = SqueezeExcite(o), ConvNormAct(o, o)
        self.conv3.bn.act = nn.Identity()
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = downsample(c, o, stride) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv3(self.se(self.conv2(self.conv1(x))))
        return self.act3(x + self.downsample(shortcut))


class RegStage(nn.Module):
    """Its blocks are attributes b1, b2, …"""

    grad_checkpointing = False

    def __init__(self, c: int, o: int, depth: int = 2):
        super().__init__()
        for number in range(depth):
            block = RegNetBlock(c if number == 0 else o, o, 2 if number == 0 else 1)
            self.add_module(f"b{number + 1}", block)

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return x
        for block in self.children():
            x = block(x)
        return x


class RegNet(nn.Module):
    """timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.s1, self.s2 = ConvNormAct(3, 8, 3), RegStage(8, 12), RegStage(12, 16)
        self.final_conv, self.head = nn.Identity(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final_conv(self.s2(self.s1(self.stem(x)))).mean((2, 3)))


class DlaTree(nn.Module):
    """A level of timm's DLA: two blocks as attributes and a root that joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.tree1, self.tree2 = Basic(8, 8, 1), Basic(8, 8, 1)
        self.root = ConvNormAct(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        first = self.tree1(x)
        second = self.tree2(first)
        return self.root(torch.cat([second, first], 1))


class ConvNeXtBlock(nn.Module):
    """timm's, its MLP linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        hidden = self.fc2(self.act(self.fc1(hidden))).permute(0, 3, 1, 2)
        return hidden * self.gamma.reshape(1, -1, 1, 1) + x


class ConvNeXtStage(nn.Module):
    """timm's: a downsampling between the lists of blocks."""

    def __init__(self, c: int, o: int):
        super().__init__()
        self.downsample = nn.Conv2d(c, o, 2, 2)
        self.blocks = nn.Sequential(ConvNeXtBlock(o), ConvNeXtBlock(o))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Classifier(nn.Module):
    """A stem, some stages and a classifier."""

    def __init__(self, width: int, stage: Callable[[], nn.Module]):
        super().__init__()
        self.stem, self.stage = ConvNormAct(3, 8, 3), stage()
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


# Networks whose blocks lie in no list, or not one behind the other.
UNLISTED: dict[str, Callable[[], nn.Module]] = {
    "regnet": RegNet,
    "dla": lambda: Classifier(8, DlaTree),
    "convnext": lambda: Classifier(
        12, lambda: nn.Sequential(ConvNeXtStage(8, 12), ConvNeXtStage(12, 12))
    ),
}


# Forms of a gate's vectors [B, C] that multiply a map [B, C, H, W].
SPREADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expand_as": lambda x, z: x * z.view(x.size(0), x.size(1), 1, 1).expand_as(x),
    "view": lambda x, z: x * z.view(x.shape[0], x.size()[1], 1, 1),
    "rest": lambda x, z: x * z.view(len(x), -1, 1, 1),
    "reshape": lambda x, z: x * z.reshape(x.shape[0], x.shape[1], 1, 1),
    "unflatten": lambda x, z: x * z.unflatten(1, (x.size(1), 1, 1)),
    "unsqueeze": lambda x, z: x * z.unsqueeze(-1).unsqueeze(-1),
    "index": lambda x, z: z[..., None, None] * x,
    "slices": lambda x, z: z[:, :, None, None] * x,
}


class LinearGate(nn.Module):
    """Squeeze-and-excitation of linear layers."""

    def __init__(self, channels: int, spread: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.spread = spread
        self.fc = nn.Sequential(
            nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), x.size(1)))
        return self.spread(x, z)


class LinearlyGated(nn.Module):
    """An inverted residual with such a gate between its depthwise and its last convolution."""

    def __init__(self, c: int, wide: int, spread: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.expand, self.bn1 = conv(c, wide, 1), nn.BatchNorm2d(wide)
        self.depthwise, self.bn2 = conv(wide, wide, 3, 1, wide), nn.BatchNorm2d(wide)
        self.gate, self.project = LinearGate(wide, spread), conv(wide, c, 1)
        self.bn3 = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn1(self.expand(x)))
        y = self.gate(F.hardswish(self.bn2(self.depthwise(y))))
        return x + self.bn3(self.project(y))


def linearly_gated(spread: Callable[[Tensor, Tensor], Tensor], wide: int = 11) -> nn.Module:
    """A network of two blocks with a gate of linear layers."""
    blocks = [LinearlyGated(7, wide, spread), LinearlyGated(7, wide + 2, spread)]
    return randomised(nn.Sequential(conv(3, 7, 3), nn.Sequential(*blocks)))
