"""Torch-Pruning at equal parameters, with and without grail; its groups beside grail's sites.

    python -m bench.adapters.torch_pruning_resnet            accuracy of ResNet-18, Fashion-MNIST
    python -m bench.adapters.torch_pruning_resnet --sites    groups and sites of many networks

ResNet-18 loses half of the channels of every layer, the residual stream included, by
Torch-Pruning's default criterion. The same pruner is run alone, alone with batch norms measured
again, with `compensate` between its groups, and by `prune`. Calibration images carry no labels.

It needs the environment of Torch-Pruning, with timm, torchvision and transformers.
"""

import copy
import importlib
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality import networks
from bench.quality.scores import accuracy
from bench.tools import assets
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import ROOT, Row
from bench.tools.tables import aligned

CALIBRATION, BATCH = 1024, 128
SEEDS = (0, 1, 2)  # of the calibration images
LIMIT = 90  # seconds for the sites of one network

Outcome = dict[str, Any]


def pruner_of(network: nn.Module, keep: float) -> Any:
    """Torch-Pruning's pruner with its default criterion; the classifier keeps its outputs."""
    import torch_pruning

    return torch_pruning.pruner.MagnitudePruner(
        network,
        torch.zeros(1, 1, 28, 28),
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=1 - keep,
        ignored_layers=[network.fc],
    )


def alone(network: nn.Module, batches: list[Tensor], keep: float) -> None:
    """Prunes, nothing else."""
    for group in pruner_of(network, keep).step(interactive=True):
        group.prune()


def with_batch_norms(network: nn.Module, batches: list[Tensor], keep: float) -> None:
    """Prunes, then measures the statistics of all batch norms again."""
    alone(network, batches, keep)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    network.eval()


def between_groups(network: nn.Module, batches: list[Tensor], keep: float) -> None:
    """Compensates each group before it is pruned."""
    from grail.adapters.torch_pruning import compensate

    for group in pruner_of(network, keep).step(interactive=True):
        compensate(network, group, batches)
        group.prune()


def in_one_line(network: nn.Module, batches: list[Tensor], keep: float) -> None:
    """Prunes all groups, then restores layer by layer."""
    from grail.adapters.torch_pruning import prune

    prune(pruner_of(network, keep), batches, progress=False)


WAYS: dict[str, Callable[[nn.Module, list[Tensor], float], None]] = {
    "alone": alone,
    "alone, batch norms reset": with_batch_norms,
    "compensate": between_groups,
    "prune": in_one_line,
}


def accuracies(keep: float, cache: Path) -> Iterator[Row]:
    """Yields a row for each way and draw of calibration images; the first is the dense network."""
    data = assets.fashion_mnist(cache)
    inputs = networks.fashion_inputs(data.test_images)
    dense = networks.resnet18_fashion()
    best = accuracy(dense, inputs, data.test_labels)

    def row(way: str, seed: str, network: nn.Module, score: float, seconds: float) -> Row:
        parameters = sum(p.numel() for p in network.parameters())
        returned = (score - plain) / (best - plain) if plain < best else 0.0
        return {
            "network": "ResNet-18, Fashion-MNIST",
            "criterion": "GroupMagnitudeImportance",
            "keep": f"{keep:g}",
            "way": way,
            "seed": seed,
            "parameters": str(parameters),
            "accuracy": f"{score:.4f}",
            "returned": f"{returned:.4f}",
            "seconds": f"{seconds:.1f}",
        }

    plain = best
    yield row("dense", "", dense, best, 0.0)
    for way, change in WAYS.items():
        for seed in SEEDS if way != "alone" else ("",):
            network = copy.deepcopy(dense)
            batches = calibration(data.train_images, int(seed or 0))
            start = time.perf_counter()
            change(network, batches, keep)
            seconds = time.perf_counter() - start
            score = accuracy(network, inputs, data.test_labels)
            plain = score if way == "alone" else plain
            yield row(way, str(seed), network, score, seconds)


def calibration(images: Tensor, seed: int) -> list[Tensor]:
    """Batches of training images drawn at random, without labels."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return list(networks.fashion_inputs(images[order[:CALIBRATION]]).split(BATCH))


def without_operators() -> None:
    """Declares two operators that torchvision's import asks for; no network here runs them.

    The wheel in the package index is built for CUDA, and does not load its own beside a torch for
    the CPU.
    """
    try:
        importlib.import_module("torchvision")  # works in an environment of `make adapters`
    except RuntimeError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(declared)


_KEPT: list[Any] = []  # an operator goes with its library


def of_torchvision(name: str, size: int = 64, **settings: Any) -> Callable[[], tuple[Any, Any]]:
    """The maker of an untrained network of torchvision, and of an input."""

    def make() -> tuple[Any, Any]:
        without_operators()
        import torchvision

        network = getattr(torchvision.models, name)(num_classes=10, **settings)
        return network, torch.randn(1, 3, size, size)

    return make


def of_timm(name: str, size: int = 64, **settings: Any) -> Callable[[], tuple[Any, Any]]:
    """The maker of an untrained network of timm, and of an input."""

    def make() -> tuple[Any, Any]:
        without_operators()
        import timm

        return timm.create_model(name, num_classes=10, **settings), torch.randn(1, 3, size, size)

    return make


def of_transformers(
    kind: str, model: str, inputs: str = "input_ids", **settings: Any
) -> Callable[[], tuple[Any, Any]]:
    """The maker of an untrained network of transformers, and of an input."""

    def make() -> tuple[Any, Any]:
        without_operators()
        import transformers

        config = getattr(transformers, f"{kind}Config")(**settings)
        network = getattr(transformers, model)(config)
        ids = torch.arange(16).view(1, 16)
        return network, {inputs: ids if inputs == "input_ids" else torch.randn(1, 3, 32, 32)}

    return make


_SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
_TEXT = _SMALL | {"vocab_size": 100, "intermediate_size": 96}
_IMAGE = _SMALL | {"image_size": 32, "patch_size": 8, "intermediate_size": 96, "num_labels": 10}
NETWORKS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "torchvision resnet18": of_torchvision("resnet18"),
    "torchvision vgg11_bn": of_torchvision("vgg11_bn"),
    "torchvision densenet121": of_torchvision("densenet121"),
    "torchvision googlenet": of_torchvision("googlenet", aux_logits=False, init_weights=False),
    "torchvision mobilenet_v2": of_torchvision("mobilenet_v2"),
    "torchvision mobilenet_v3_small": of_torchvision("mobilenet_v3_small"),
    "torchvision shufflenet_v2_x0_5": of_torchvision("shufflenet_v2_x0_5"),
    "torchvision squeezenet1_1": of_torchvision("squeezenet1_1"),
    "torchvision regnet_y_400mf": of_torchvision("regnet_y_400mf"),
    "torchvision resnext50_32x4d": of_torchvision("resnext50_32x4d"),
    "torchvision efficientnet_b0": of_torchvision("efficientnet_b0"),
    "torchvision convnext_tiny": of_torchvision("convnext_tiny"),
    "torchvision vit_b_32": of_torchvision("vit_b_32", image_size=64),
    "timm vit_tiny_patch16_224": of_timm("vit_tiny_patch16_224", img_size=64),
    "timm mobilevit_xxs": of_timm("mobilevit_xxs"),
    "timm ghostnet_100": of_timm("ghostnet_100"),
    "timm mixer_s32_224": of_timm("mixer_s32_224", img_size=64),
    "timm swin_tiny": of_timm("swin_tiny_patch4_window7_224", 56, img_size=56),
    "timm convnext_atto": of_timm("convnext_atto"),
    "transformers ViT": of_transformers(
        "ViT", "ViTForImageClassification", "pixel_values", **_IMAGE
    ),
    "transformers Bert": of_transformers("Bert", "BertForSequenceClassification", **_TEXT),
    "transformers Llama": of_transformers("Llama", "LlamaForCausalLM", **_TEXT),
}
SOURCES = ("family", "trace", "groups", "sites_of")


def outcome(name: str, source: str) -> Outcome:
    """The number of sites that one source finds in a network, or why it finds none."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    network, inputs = NETWORKS[name]()
    network.eval()
    start = time.perf_counter()
    try:
        count, reasons = _counted(network, inputs, source)
        failed = ""
    except Exception as error:
        count, reasons = 0, ""
        failed = f"{type(error).__name__}: {error}".splitlines()[0].partition("; ")[0]
    seconds = time.perf_counter() - start
    return {"count": count, "reasons": reasons, "failed": failed, "seconds": seconds}


def _counted(network: Any, inputs: Any, source: str) -> tuple[int, str]:
    if source == "family":
        from grail.networks import find

        architecture = find(network)
        return sum(map(len, architecture.sites(architecture.kinds))), ""
    if source == "trace":
        import grail

        return len(grail.trace(network, streams=True)), ""
    import torch_pruning

    def first(out: Any) -> Any:
        return out if isinstance(out, Tensor) else out[0]

    graph = torch_pruning.DependencyGraph().build_dependency(
        network, inputs, output_transform=first, verbose=False
    )
    if source == "groups":
        groups = graph.get_all_groups()
        return sum(_is_read(graph, group) for group in groups), ""
    from grail.adapters.torch_pruning import sites_of

    sites = sites_of(graph)
    reasons = sites.reasons
    del reasons["the network's output"]
    return len(sites), "; ".join(f"{reason} {n}" for reason, n in reasons.most_common())


def _is_read(graph: Any, group: Any) -> bool:
    """Returns whether a layer reads a group's channels, and they are not the network's output."""
    kinds = [dep.target.type.name for dep, _ in group]
    reads = any(graph.is_in_channel_pruning_fn(dep.handler) for dep, _ in group)
    return reads and "OUTPUT" not in kinds


def sites(name: str) -> Row:
    """The row of a network: each source in a process of its own, which may hang."""
    row: Row = {"network": name}
    for source in SOURCES:
        command = [sys.executable, "-m", "bench.adapters.torch_pruning_resnet", "--one"]
        try:
            done = subprocess.run(
                [*command, name, source], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
            )
            found = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            found = {"failed": f"no end within {LIMIT} s", "seconds": float(LIMIT)}
        except (IndexError, ValueError):
            said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            found = {"failed": said[0], "seconds": 0.0}
        row[source] = str(found.get("count", 0))
        row[f"{source}_seconds"] = f"{found['seconds']:.2f}"
        row[f"{source}_note"] = found.get("failed") or found.get("reasons", "")
    return row


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints one of the two tables."""
    parser = CommandLine(
        __doc__,
        *("keep", "threads"),
        results="adapters_torch_pruning",
        instead={"sites": "adapters_sites"},
        takes="3 minutes on one core; with --sites 8",
    )
    parser.add_argument("--sites", action="store_true", help="count sites of many networks")
    parser.add_argument("--network", action="append", help="of --sites; may be repeated")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "SOURCE"), help="print one as JSON")
    parser.add_argument("--cache", type=Path, default=Path(".assets"), help="folder (%(default)s)")
    options = parser.read(arguments)
    if options.one:
        print(json.dumps(outcome(*options.one)))
        return 0
    if options.sites:
        rows = [_told(sites(each), ("network", *SOURCES)) for each in options.network or NETWORKS]
        columns: tuple[str, ...] = ("network", *SOURCES, "sites_of_note")
        measures = tuple(name for name in rows[0] if name != "network")
    else:
        columns = ("way", "seed", "parameters", "accuracy", "returned", "seconds")
        measures = ("parameters", "accuracy", "returned", "seconds")
        rows = [_told(row, columns) for row in accuracies(options.keep, options.cache)]
    print(aligned(columns, [[row[column] for column in columns] for row in rows]))
    save(options, rows, measures)
    return 0


def _told(row: Row, columns: tuple[str, ...]) -> Row:
    print(", ".join(row[column] for column in columns), file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
