"""Vision networks as ONNX files: difference from torch, and speed of the dense and the small file.

    python -m bench.quality.onnx               adds the rows that bench/results/onnx.csv lacks
    python -m bench.quality.onnx --output new/    measures them again, and compares

Each network is compressed to half the channels of its sites and written dense and small by
`grail.export_onnx`. One process then loads both in torch, ONNX Runtime and OpenVINO, one thread
each, and runs them in turns: dense, small, dense, small. Times are CPU seconds, and a ratio is the
median of the ratios of the rounds. Packages that are not installed are said and left out.
"""

import copy
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import grail
from bench.quality import networks
from bench.tools.commandline import CommandLine
from bench.tools.measuring import Row, Table
from bench.tools.tables import aligned
from grail.serving.onnx_check import runtimes

KEEP = 0.5
BATCHES = (1, 8)
_LEAST = 0.05  # CPU seconds of the calls that are timed together
_IMAGES = 4  # of a calibration batch: random, for widths alone decide the speed
Run = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Network:
    """A network that is measured.

    Args:
        make: of the dense one.
        shape: of an image.
        package: that it needs; "" is none.
        is_trained: a network of random weights is pruned without compensation.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    package: str = ""
    is_trained: bool = False


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
    return ViTForImageClassification(ViTConfig(**sizes, intermediate_size=1536, num_labels=1000))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("torchvision").models.get_model(name)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name)


NETWORKS = {
    "ResNet-18, 20 channels, 28×28, trained": Network(
        networks.resnet18_fashion, (1, 28, 28), is_trained=True
    ),
    "ViT 6×96, 28×28, trained": Network(networks.vit_fashion, (1, 28, 28), "transformers", True),
    "EfficientNet-lite0, trained": Network(
        networks.efficientnet_lite0, (3, 224, 224), is_trained=True
    ),
    "ViT 6×384": Network(_vit, (3, 224, 224), "transformers"),
    "torchvision ResNet-18": Network(_torchvision("resnet18"), (3, 224, 224), "torchvision"),
    "torchvision ResNet-50": Network(_torchvision("resnet50"), (3, 224, 224), "torchvision"),
    "torchvision MobileNetV2": Network(_torchvision("mobilenet_v2"), (3, 224, 224), "torchvision"),
    "timm ViT-Ti/16": Network(_timm("vit_tiny_patch16_224"), (3, 224, 224), "timm"),
    "timm EfficientNet-B0": Network(_timm("efficientnet_b0"), (3, 224, 224), "timm"),
}


def pair(network: Network) -> tuple[nn.Module, nn.Module]:
    """The dense and the small network."""
    torch.manual_seed(0)
    dense = network.make().eval()
    small = copy.deepcopy(dense)
    batches = [torch.randn(_IMAGES, *network.shape) for _ in range(2)]
    settings = {"selector": "magnitude", "compensate": network.is_trained, "progress": False}
    grail.compress(small, batches, KEEP, **settings)
    return dense, small


def of_torch(model: nn.Module, path: Path) -> Run:
    """A network as it is in torch."""
    return lambda x: model(x)


def of_onnxruntime(model: nn.Module, path: Path) -> Run:
    """Its file in ONNX Runtime, on one thread."""
    library: Any = importlib.import_module("onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return lambda x: session.run(None, {name: x.numpy()})


def of_openvino(model: nn.Module, path: Path) -> Run:
    """Its file in OpenVINO in fp32, on one thread."""
    library: Any = importlib.import_module("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = library.Core().compile_model(str(path), "CPU", options)
    return lambda x: compiled(x.numpy())


LOADERS = {"torch": of_torch, "onnxruntime": of_onnxruntime, "openvino": of_openvino}


def seconds(run: Run, x: Tensor, calls: int) -> float:
    """CPU seconds of a call, the mean of several in a row."""
    start = time.process_time()
    for _ in range(calls):
        run(x)
    return (time.process_time() - start) / calls


@torch.inference_mode()
def in_turns(dense: Run, small: Run, x: Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of both in each round, after one that warms up."""
    for run in (dense, small):
        run(x)
    calls = max(1, round(_LEAST / max(seconds(dense, x, 1), 1e-9)))
    found = [(seconds(dense, x, calls), seconds(small, x, calls)) for _ in range(rounds)]
    return [one for one, _ in found], [other for _, other in found]


def measure(name: str, rounds: int) -> Iterator[Row]:
    """Rows of a network: each runtime at each batch size."""
    network = NETWORKS[name]
    models = pair(network)
    example = torch.randn(2, *network.shape)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, file) for file in ("dense.onnx", "small.onnx")]
        files = [grail.export_onnx(m, p, example) for m, p in zip(models, paths, strict=True)]
        shares = {c.runtime: c.share for c in files[1].comparisons}
        versions = {"torch": f"torch {torch.__version__}", **runtimes()}
        for runtime, version in versions.items():
            dense, small = (LOADERS[runtime](m, p) for m, p in zip(models, paths, strict=True))
            for batch in BATCHES:
                x = torch.randn(batch, *network.shape)
                times = in_turns(dense, small, x, rounds)
                ratios = [one / other for one, other in zip(*times, strict=True)]
                yield {
                    "network": name,
                    "runtime": version,
                    "batch": str(batch),
                    "dense_ms": f"{1e3 * statistics.median(times[0]):.4g}",
                    "small_ms": f"{1e3 * statistics.median(times[1]):.4g}",
                    "ratio": f"{statistics.median(ratios):.3f}",
                    "ratio_min": f"{min(ratios):.3f}",
                    "ratio_max": f"{max(ratios):.3f}",
                    "difference": f"{shares[version]:.1e}" if version in shares else "",
                    "dense_bytes": str(files[0].bytes),
                    "small_bytes": str(files[1].bytes),
                }


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for the page: a network a row, ratios of the runtimes at batch 1 and 8."""
    header = ["network", "file, dense and small", *LOADERS.values(), "difference"]
    header[2:5] = ["torch", "ONNX Runtime", "OpenVINO"]
    found: list[list[str]] = []
    for name in NETWORKS:
        own = [row for row in rows if row["network"] == name]
        if not own:
            continue
        size = " → ".join(f"{int(own[0][key]) / 1e6:.1f}" for key in ("dense_bytes", "small_bytes"))
        cells = [name, f"{size} MB"]
        for runtime in header[2:5]:
            of = [row for row in own if row["runtime"].startswith(runtime)]
            cells.append(" / ".join(f"{float(row['ratio']):.2f}×" for row in of) or "–")
        shares = [float(row["difference"]) for row in own if row["difference"]]
        found.append([*cells, f"{max(shares):.1e}" if shares else "–"])
    return header, found


def main(arguments: list[str] | None = None) -> None:
    """Measures the networks whose rows are missing."""
    parser = CommandLine(__doc__, "repeats", takes="15 minutes on one core", rows="onnx")
    parser.add_argument("--network", action="append", choices=[*NETWORKS], help="may be repeated")
    options = parser.read(arguments)
    torch.set_num_threads(1)
    rows = Table(options.output, ("network", "runtime", "batch"))
    for name in options.network or NETWORKS:
        package = NETWORKS[name].package
        if package and find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
        elif any(row["network"] == name for row in rows.rows):
            print(f"already measured in {options.output}: {name}")
        else:
            for row in list(measure(name, options.repeats)):
                rows.add(row)
    print(aligned(*table(rows.rows)))


if __name__ == "__main__":
    main()
