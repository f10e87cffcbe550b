"""Batch norm's statistics after a run with repair=True, against those of whole forward passes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.errors import InputError
from grail.networks import find
from grail.runtime.processes import Processes
from grail.runtime.transaction import Transaction
from grail.statistics.batchnorm import reset_norm
from tests.convnets import Basic, Net, images, network, randomised


def inputs_of(model: nn.Module, norm: nn.Module, batches: list[Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen).movedim(1, 0).flatten(1)


def repair_by_hand(model: nn.Module, norms: list[nn.BatchNorm2d], batches: list[Tensor]) -> None:
    """Norm by norm in the order given, each behind those before it."""
    for norm in norms:
        x = inputs_of(model, norm, batches)
        norm.running_mean, norm.running_var = x.mean(1).float(), x.var(1).float()


def norms_of_blocks(model: nn.Module) -> list[nn.Module]:
    blocks = find(model).blocks
    return [m for block in blocks for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def narrowed(model: nn.Module, repair: bool, **settings) -> nn.Module:
    model = copy.deepcopy(model)
    settings = {"selector": "magnitude", "compensate": False, "multiple": 1, **settings}
    grail.compress(model, images(), 0.5, repair=repair, progress=False, **settings)
    return model


def assert_same_norms(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, mine), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        # fp32 forward passes through a dozen layers.
        torch.testing.assert_close(
            mine, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "name", ["torchvision-basic", "torchvision-bottleneck", "pre-activation", "timm-inverted-se"]
)
@pytest.mark.parametrize("selector", ["magnitude", "folding-kmeans"])
def test_repair_resets_norms_to_what_whole_forward_passes_show(name, selector):
    model = network(name)
    reference = narrowed(model, repair=False, selector=selector)
    repair_by_hand(reference, norms_of_blocks(reference), images())
    assert_same_norms(narrowed(model, repair=True, selector=selector), reference)


@pytest.mark.parametrize("repair", [True, False])
def test_the_report_says_that_errors_are_those_before_repair(repair):
    report = grail.compress(
        network("cifar"), images(), 0.5, repair=repair, progress=False, multiple=1
    )
    assert any("before the batch norms were reset" in note for note in report.notes) is repair


def test_repair_comes_behind_compensation():
    model = network("torchvision-basic")
    repaired = narrowed(model, repair=True, compensate=True)
    again = copy.deepcopy(repaired)
    repair_by_hand(again, norms_of_blocks(again), images())  # nothing is left to repair
    assert_same_norms(repaired, again)


class Backwards(nn.Module):
    """Its norms are registered in another order than they run, and one does not run."""

    def __init__(self):
        super().__init__()
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3)
        self.unused, self.untracked = (
            nn.BatchNorm2d(8),
            nn.BatchNorm2d(8, track_running_stats=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.untracked(self.bn2(self.conv2(x)))


def test_repair_follows_the_order_in_which_norms_run():
    torch.manual_seed(0)
    model = Backwards().eval()
    site = grail.Site(producers=["conv1"], along=["bn1"], consumers=["conv2"])
    reference = narrowed(model, repair=False, sites=[site])
    repair_by_hand(reference, [reference.bn1, reference.bn2], images())
    assert_same_norms(narrowed(model, repair=True, sites=[site]), reference)


def test_a_variance_far_below_the_squared_mean_is_not_lost():
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(3), 1e4 + 0.1 * torch.randn(50, 3, 4, 4)
    with Transaction() as transaction:
        reset_norm(norm, lambda: x.split(20), transaction, Processes().total)
    expected = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(norm.running_mean, expected.mean(1).float())
    # fp64 sums; the last digit is that of the fp32 buffer.
    torch.testing.assert_close(norm.running_var, expected.var(1).float(), rtol=1e-6, atol=0)


def test_repair_wants_the_closed_loop():
    with pytest.raises(InputError, match="closed loop"):
        grail.compress(
            network("cifar"), images(), 0.5, repair=True, closed_loop=False, drift_correction=0
        )


def test_repair_wants_batch_norms():
    class Plain(Basic):
        def __init__(self, c: int, o: int, stride: int):
            super().__init__(c, o, stride)
            self.bn1 = self.bn2 = nn.Identity()

    model = randomised(Net(lambda c, o, stride: Plain(16, 16, 1)))
    with pytest.raises(InputError, match="has none"):
        grail.compress(model, images(), 0.5, repair=True, progress=False)
