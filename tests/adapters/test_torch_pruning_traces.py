"""The sites that a trace finds, beside the groups of Torch-Pruning's dependency graph."""

import copy
import sys

import pytest
import torch
from torch import nn

import grail

tp = pytest.importorskip("torch_pruning")


def _library(name):
    """Returns timm or torchvision, also where torchvision's compiled operators are of no use."""
    try:
        return __import__(name, fromlist=["models"])
    except ImportError:
        pytest.skip(f"{name} is not installed")
    except RuntimeError:  # operators that the import registers shapes for, and that are not there
        for module in [m for m in sys.modules if m.partition(".")[0] in ("torchvision", "timm")]:
            del sys.modules[module]
        own = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            own.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.kept = own  # else the operators go with it
        return __import__(name, fromlist=["models"])


def network(name, **settings):
    torch.manual_seed(0)
    library, _, own = name.partition(".")
    models = _library(library)
    if library == "timm":
        return models.create_model(own, pretrained=False, **settings).eval()
    return getattr(models.models, own)(weights=None, **settings).eval()


STREAM = "the residual stream of each stage passes a layer norm, which mixes channels"
# By network: the size of its images, their groups that are no sites, and why.
NETWORKS = {
    "torchvision.densenet121": (64, 0, ""),
    "torchvision.googlenet": (64, 0, ""),
    "torchvision.inception_v3": (96, 0, ""),
    "torchvision.regnet_y_400mf": (64, 0, ""),
    "torchvision.resnext50_32x4d": (64, 0, ""),
    "torchvision.mobilenet_v3_small": (64, 0, ""),
    "torchvision.efficientnet_b0": (64, 0, ""),
    "torchvision.squeezenet1_1": (64, 1, "the last convolution writes the network's output"),
    "timm.ghostnet_100": (64, 0, ""),
    "timm.mobilevit_xxs": (128, 12, f"nine attentions' queries, keys and values; {STREAM}"),
    "torchvision.convnext_tiny": (64, 4, STREAM),
    "torchvision.vit_b_16": (224, 1, STREAM),
}
QUIET = {"aux_logits": False, "init_weights": False}


@pytest.mark.parametrize(("name", "size", "behind", "why"), [(n, *v) for n, v in NETWORKS.items()])
def test_a_trace_finds_what_a_dependency_graph_finds_or_has_a_reason(name, size, behind, why):
    settings = QUIET if name.endswith(("googlenet", "v3")) and "mobile" not in name else {}
    model, x = network(name, **settings), torch.randn(2, 3, size, size)
    sites = grail.trace(model, streams=True, example=x)
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    groups = list(graph.get_all_groups(ignored_layers=last))
    assert len(sites) == len(groups) - behind, why


def test_every_site_of_a_ghostnet_can_be_narrowed():
    dense, x = network("timm.ghostnet_050"), torch.randn(4, 3, 32, 32)
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):  # else next to nothing reaches the output
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    sites, errors = grail.trace(dense, streams=True), []
    assert len(sites) == 31
    for compensate in (False, True):
        model = copy.deepcopy(dense)
        grail.compress(
            model,
            [x],
            0.75,
            sites[-6:],
            "magnitude",
            compensate=compensate,
            alpha=1e-2,
            drift_correction=0,
            per_tap=False,
            progress=False,
        )
        with torch.no_grad():
            errors.append((model(x) - dense(x)).norm())
    assert errors[1] < 0.5 * errors[0]
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
