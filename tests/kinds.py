"""Small networks, one for each kind of layer that a site may have, and what a run should make."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import grail


class Gated(nn.Module):
    """One layer writes gate and up, one after the other or row by row."""

    def __init__(self, interleaved: bool):
        super().__init__()
        self.gate_up, self.down = nn.Linear(5, 22), nn.Linear(11, 7)
        self.interleaved = interleaved

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


class Falcon(nn.Linear):
    """transformers' FalconLinear: a forward of its own that computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


@dataclass(frozen=True)
class Kind:
    """A network of one site, and the shape of a batch.

    `groups`: in how many the producer writes its channels.
    """

    make: Callable[[], nn.Module]
    site: grail.Site
    shape: tuple[int, ...]
    groups: int = 1


def _chain(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(*modules))


def _site(producer: str, consumer: str, *along: str) -> grail.Site:
    return grail.Site([producer], [consumer], list(along))


RELU = nn.ReLU()

KINDS = {
    "conv1d": Kind(
        _chain(nn.Conv1d(3, 11, 3), RELU, nn.Conv1d(11, 4, 3, stride=2, padding=2)),
        _site("0", "2"),
        (5, 3, 13),
    ),
    "conv1d-equal-sizes": Kind(
        _chain(nn.Conv1d(8, 8, 1), RELU, nn.Conv1d(8, 8, 3, padding=1)), _site("0", "2"), (8, 8, 8)
    ),
    "conv3d": Kind(
        _chain(nn.Conv3d(3, 7, 1), RELU, nn.Conv3d(7, 4, (2, 3, 1), padding=(1, 0, 2))),
        _site("0", "2"),
        (5, 3, 4, 5, 3),
    ),
    "same": Kind(
        _chain(nn.Conv2d(3, 11, 1), RELU, nn.Conv2d(11, 4, (2, 3), padding="same", dilation=2)),
        _site("0", "2"),
        (5, 3, 7, 6),
    ),
    "reflect": Kind(
        _chain(
            nn.Conv2d(3, 11, 1), RELU, nn.Conv2d(11, 4, 3, padding=(2, 1), padding_mode="reflect")
        ),
        _site("0", "2"),
        (5, 3, 7, 5),
    ),
    "circular": Kind(
        _chain(
            nn.Conv1d(3, 11, 1), RELU, nn.Conv1d(11, 4, 4, padding="same", padding_mode="circular")
        ),
        _site("0", "2"),
        (5, 3, 11),
    ),
    "transposed": Kind(
        _chain(
            nn.Conv2d(3, 11, 1),
            RELU,
            nn.ConvTranspose2d(11, 4, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(1, 2)),
        ),
        _site("0", "2"),
        (5, 3, 4, 5),
    ),
    "transposed1d": Kind(
        _chain(nn.Conv1d(3, 11, 1), RELU, nn.ConvTranspose1d(11, 4, 1, 2, output_padding=1)),
        _site("0", "2"),
        (5, 3, 7),
    ),
    "transposed3d": Kind(
        _chain(nn.Conv3d(3, 7, 1), RELU, nn.ConvTranspose3d(7, 4, 2, 2)),
        _site("0", "2"),
        (5, 3, 2, 3, 2),
    ),
    "transposed-producer": Kind(
        _chain(nn.ConvTranspose2d(3, 11, 2, 2), RELU, nn.Conv2d(11, 4, 3)),
        _site("0", "2"),
        (5, 3, 4, 5),
    ),
    "transposed-groups": Kind(
        _chain(nn.ConvTranspose2d(4, 10, 3, 2, groups=2), RELU, nn.Conv2d(10, 3, 2)),
        _site("0", "2"),
        (5, 4, 3, 4),
        groups=2,
    ),
    "transposed-depthwise": Kind(
        _chain(
            nn.Conv1d(3, 11, 1),
            RELU,
            nn.ConvTranspose1d(11, 11, 3, 2, groups=11),
            nn.Conv1d(11, 4, 2),
        ),
        _site("0", "3", "2"),
        (5, 3, 7),
    ),
    "flatten": Kind(
        _chain(nn.Conv2d(3, 11, 3), RELU, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(66, 4)),
        _site("0", "4"),
        (25, 3, 8, 6),
    ),
    "flatten-equal-sizes": Kind(
        _chain(nn.Conv1d(4, 4, 1), RELU, nn.Flatten(), nn.Linear(16, 4)),
        _site("0", "3"),
        (4, 4, 4),
    ),
    "sync-norm": Kind(
        _chain(nn.Conv2d(3, 11, 3), nn.SyncBatchNorm(11), RELU, nn.Conv2d(11, 4, 3)),
        _site("0", "3", "1"),
        (5, 3, 8, 6),
    ),
    "instance-norm": Kind(
        _chain(nn.Conv2d(3, 11, 3), nn.InstanceNorm2d(11, affine=True), RELU, nn.Conv2d(11, 4, 3)),
        _site("0", "3", "1"),
        (5, 3, 8, 6),
    ),
    "instance-norm-tracked": Kind(
        _chain(
            nn.Conv1d(3, 11, 3),
            nn.InstanceNorm1d(11, affine=True, track_running_stats=True),
            RELU,
            nn.Conv1d(11, 4, 3),
        ),
        _site("0", "3", "1"),
        (5, 3, 8),
    ),
    "group-norm": Kind(
        _chain(nn.Conv2d(3, 11, 3), nn.GroupNorm(11, 11), RELU, nn.Conv2d(11, 4, 3)),
        _site("0", "3", "1"),
        (5, 3, 8, 6),
    ),
    "batch-norm-of-the-batch": Kind(
        _chain(
            nn.Conv2d(3, 11, 3),
            nn.BatchNorm2d(11, track_running_stats=False),
            RELU,
            nn.Conv2d(11, 4, 3),
        ),
        _site("0", "3", "1"),
        (5, 3, 8, 6),
    ),
    "fused": Kind(
        lambda: Gated(False), grail.Site([grail.Fused("gate_up")], ["down"]), (3, 9, 5), groups=1
    ),
    "fused-interleaved": Kind(
        lambda: Gated(True),
        grail.Site([grail.Fused("gate_up", interleaved=True)], ["down"]),
        (3, 9, 5),
    ),
    "falcon": Kind(
        lambda: nn.Sequential(Falcon(5, 11), RELU, Falcon(11, 7, bias=False)),
        _site("0", "2"),
        (29, 5),
    ),
}


def network(name: str) -> nn.Module:
    """In evaluation mode, with norms that are not the identity."""
    torch.manual_seed(0)
    model = KINDS[name].make()
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.5 if tensor.dim() > 1 else 0.3)
    return model.eval()


def batches(name: str, count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(KINDS[name].shape, generator=generator) for _ in range(count)]


def seen(model: nn.Module, layer: str, data: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a layer reads and writes, batch by batch, in fp64."""
    inputs, outputs = [], []

    def hear(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(args[0].double())
        outputs.append(output.double())

    handle = model.get_submodule(layer).register_forward_hook(hear)
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return inputs, outputs


def as_rows(module: nn.Module, y: Tensor) -> Tensor:
    """Outputs [..., O] or [N, O, ...] as [rows, O]."""
    return y.flatten(0, -2) if isinstance(module, nn.Linear) else y.movedim(1, -1).flatten(0, -2)


def axis(module: nn.Module) -> int:
    """Where a weight has its outputs."""
    return 1 if type(module).__name__.startswith("ConvTranspose") else 0


def design(module: Any, inputs: list[Tensor]) -> Tensor:
    """[rows, columns]: the layer's output for each of its weights alone, by running it."""
    twin = copy.deepcopy(module).double()
    twin.bias = None
    one = twin.weight.detach().select(axis(module), 0)
    columns = []
    for column in range(one.numel()):
        weight = torch.zeros_like(one).flatten()
        weight[column] = 1
        with torch.no_grad():
            twin.weight.zero_().select(axis(module), 0).copy_(weight.view_as(one))
            columns.append(torch.cat([as_rows(twin, twin(x))[:, 0] for x in inputs]))
    return torch.stack(columns, 1)


def by_output(module: Any) -> Tensor:
    """A layer's weight as [O, columns of `design`], fp64."""
    return module.weight.detach().double().movedim(axis(module), 0).flatten(1)


def ridge(x: Tensor, target: Tensor, alpha: float) -> Tensor:
    """The W' of least ‖target − x W'ᵀ‖² + λ‖W'‖², by least squares on more rows, not a Gram."""
    strength = (alpha * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, strength * torch.eye(x.shape[1], dtype=x.dtype)])
    zeros = target.new_zeros(x.shape[1], target.shape[1])
    return torch.linalg.lstsq(rows, torch.cat([target, zeros])).solution.T
