"""Trains the Fashion-MNIST networks of the benchmarks.

    python -m bench.quality.train resnet18
    python -m bench.quality.train clip --epochs 6

Every epoch draws its order, crops and flips from a generator seeded by (seed, epoch), so a run that
was stopped resumes after its last epoch and reaches the same weights. The last epoch is kept: the
test images choose nothing.
"""

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.quality import captions, networks
from bench.quality.scores import accuracy
from bench.tools import assets
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS
from grail.errors import InputError

BATCH = 128
# By name: the untrained network, and the stored one.
NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "resnet18": (networks.new_resnet18, networks.resnet18_fashion),
    "vit": (networks.new_vit, networks.vit_fashion),
    "clip": (
        lambda: captions.Captioned(captions.new_clip()),
        lambda: captions.Captioned(captions.clip_fashion()),
    ),
}
_FIELDS = ("network", "seed", "epoch", "loss", "test_accuracy", "seconds")


def augmented(
    images: Tensor,  # [N, 28, 28] uint8
    generator: torch.Generator,
    shift: int,
) -> Tensor:  # [N, 28, 28] uint8
    """Each image moved by up to `shift` pixels either way, and mirrored every second time."""
    count = len(images)
    shifts = torch.randint(2 * shift + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    windows = F.pad(images, (shift,) * 4).unfold(1, 28, 1).unfold(2, 28, 1)
    shifted = windows[torch.arange(count), shifts[0], shifts[1]]
    return torch.where(mirrored[:, None, None], shifted.flip(2), shifted)


def epoch_batches(
    images: Tensor, labels: Tensor, seed: int, epoch: int, shift: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [BATCH, 1, 28, 28] and labels [BATCH] of one epoch; a partial batch is left out."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(len(images), generator=generator)
    for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
        yield (
            networks.fashion_inputs(augmented(images[rows], generator, shift)),
            labels[rows].long(),
        )


class Muon(torch.optim.Optimizer):
    """Momentum, each matrix of it made orthogonal (Jordan et al. 2024).

    torch.optim.Muon does the same in bf16, which a CPU without AVX-512 emulates: there a step of
    the transformer took 2.3 seconds with it, and 1.2 with this.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of every matrix; 0.95 is the momentum, and Nesterov's."""
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                step = _orthogonal(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(step, alpha=group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:  # [M, N] both
    """About U Vᵀ of the matrix U S Vᵀ, by five of Newton and Schulz's iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def recipe(
    name: str, network: nn.Module, steps: int, scale: float = 1.0
) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]]:
    """Optimisers and learning rates: SGD for the ResNet, Muon and AdamW for the transformers.

    In a trial of 150 steps Muon on the matrices of its layers got 82.7% of the test images right,
    AdamW on everything 80.1%.
    """
    optimisers: list[torch.optim.Optimizer]
    if name == "resnet18":
        settings: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
        optimisers = [torch.optim.SGD(network.parameters(), lr=0.2, **settings)]
    else:
        named = dict(network.named_parameters())
        inner = [p for key, p in named.items() if p.ndim == 2 and ".layers." in key]
        rest = [p for key, p in named.items() if not any(p is q for q in inner)]
        optimisers = [
            Muon(inner, lr=0.02, weight_decay=0.05),
            torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.05),
        ]
    return [
        (
            optimiser,
            torch.optim.lr_scheduler.OneCycleLR(
                optimiser,
                scale * optimiser.param_groups[0]["lr"],
                total_steps=steps,
                pct_start=0.2,
                cycle_momentum=False,
            ),
        )
        for optimiser in optimisers
    ]


def train_epoch(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Sequence[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]],
) -> float:
    """One pass over `batches`, with labels smoothed by 0.1; returns the mean loss."""
    network.train()
    losses = []
    for inputs, labels in batches:
        outputs = network(inputs.contiguous(memory_format=torch.channels_last))
        logits = getattr(outputs, "logits", outputs)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        for optimiser, schedule in recipe:
            optimiser.step()
            schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def save(name: str, network: Any, folder: Path) -> None:
    """Writes the weights in fp16: one safetensors file, or a `save_pretrained` folder."""
    if name == "resnet18":
        state = {
            key: value.half().contiguous() if value.is_floating_point() else value
            for key, value in network.state_dict().items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "resnet18_fashion.safetensors")
    else:
        getattr(network, "clip", network).half().save_pretrained(folder / f"{name}_fashion")


def train(
    name: str,
    epochs: int,
    seed: int,
    cache: Path,
    weights: Path,
    log: Path,
    again: float | None = None,
) -> None:
    """Trains one network, or resumes, and writes a row of `log` after every epoch.

    Args:
        again: the scale of the learning rates in a further cycle from the stored weights.
    """
    torch.manual_seed(seed)
    data = assets.fashion_mnist(cache)
    new, stored = NETWORKS[name]
    network: Any = new()
    if again:
        network.load_state_dict(stored().state_dict())
    run = f"{name} again" if again else name
    network.to(memory_format=torch.channels_last)
    steps = epochs * (len(data.train_images) // BATCH)
    pairs = recipe(name, network, steps, scale=again or 1.0)
    parts = {"network": network}
    for number, (optimiser, schedule) in enumerate(pairs):
        parts |= {f"optimiser {number}": optimiser, f"schedule {number}": schedule}
    scaled = f"-scale{again:g}" if again else ""
    checkpoint = cache / f"{run}-seed{seed}-epochs{epochs}{scaled}.pt"
    shift = 2 if name == "resnet18" else 0  # a patch of four pixels would be another one
    done = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved.pop("epoch")
        for part, state in saved.items():
            parts[part].load_state_dict(state)
    for epoch in range(done + 1, epochs + 1):
        start = time.perf_counter()
        batches = epoch_batches(data.train_images, data.train_labels, seed, epoch, shift)
        loss = train_epoch(network, batches, pairs)
        seconds = time.perf_counter() - start
        inputs = networks.fashion_inputs(data.test_images)
        score = accuracy(network.eval(), inputs, data.test_labels)
        _append(log, (run, seed, epoch, f"{loss:.4f}", f"{score:.4f}", f"{seconds:.0f}"))
        states = {part: value.state_dict() for part, value in parts.items()}
        torch.save({"epoch": epoch, **states}, checkpoint)
    save(name, network, weights)


def _append(log: Path, row: tuple[Any, ...]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    fresh = not log.is_file()
    with log.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([_FIELDS, row] if fresh else [row])


def main() -> None:
    """Trains one network."""
    parser = CommandLine(
        __doc__,
        writes="weights into --weights, checkpoints into --cache, rows into --log",
        takes="about 40 minutes for resnet18, 70 for vit, on 2 cores; 8 for clip on one",
    )
    parser.add_argument("name", metavar="network", choices=[*NETWORKS])
    parser.add_argument("--epochs", type=int, default=10, help="passes over the 60 000 images")
    again = "a further cycle from the stored weights, its learning rates scaled (by 0.2)"
    parser.add_argument("--again", type=float, nargs="?", const=0.2, metavar="SCALE", help=again)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, crops and flips")
    for name, folder in (("cache", Path(".assets")), ("weights", networks.WEIGHTS)):
        parser.add_argument(f"--{name}", type=Path, default=folder, help="folder (%(default)s)")
    parser.add_argument("--log", type=Path, help="CSV (default: bench/results/train_NETWORK.csv)")
    options = parser.read()
    options.log = options.log or RESULTS / f"train_{options.name}.csv"
    try:
        train(**vars(options))
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
