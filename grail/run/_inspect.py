"""The savings and the cost of a run, before it runs: `inspect`, which changes nothing.

Memory is predicted as every run predicts it (`grail.run.peak_memory`), on two made-up batches. Time
is measured: one block is compressed on them, rolled back, and its seconds are scaled by the number
of blocks and batches.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from grail.algebra.width import Width
from grail.arguments import require_model, require_whole
from grail.calibrate.stream import Role, Stream
from grail.files.load import positions
from grail.networks import Architecture, BoundSite, find
from grail.recipe import AnyRecipe, Keep, Recipe, merged
from grail.run import peak_memory
from grail.run.block import BlockCompressor
from grail.run.blocks import Blocks
from grail.run.served import fits, generates, refused
from grail.runtime import memory
from grail.runtime.clock import Clock
from grail.runtime.onload import Onloader, computing_device
from grail.runtime.settings import Runtime
from grail.runtime.transaction import Transaction, eval_no_grad
from grail.statistics.collector import ignore
from grail_kernels import check_kind

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class SiteKind:
    """All sites of one kind: how many, and how wide each is, or their range, in words."""

    kind: str
    count: int
    structure: str


@dataclass(frozen=True)
class Saving:
    """The model at one keep ratio: widths in words by kind, parameters and bytes.

    `fits`: by kind, how many widths satisfy each rule of quantisers and runtimes, such as
    "groups: 128" or "tensor parallel: 8"; empty for a network that is no language model.
    """

    keep: Any  # a ratio, or one for each kind or site
    widths: dict[str, str]
    parameters: int
    bytes: int
    fits: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(repr=False)
class Inspection:
    """Sites, savings and the predicted cost of a run. Nothing was changed to find out.

    `memory`: bytes by part, and their "peak"; `seconds`: by phase, and their "total". Both are
    empty for a model that does not read token ids. `notes`: widths of the predicted run that
    quantisers refuse.
    """

    name: str
    parameters: int
    bytes: int
    sites: list[SiteKind]
    savings: list[Saving]
    keep: Any  # of the predicted run: a ratio, or one for each kind
    tokens: int
    memory: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.count} × {site.kind}" for site in self.sites)
        cost = ""
        if self.memory and self.seconds:
            cost = f", peak {self.memory['peak'] / 1e9:.3g} GB, {self.seconds['total']:.3g} s"
        return f"Inspection({self.name}, {self.parameters:,} parameters, {sites}{cost})"


def inspect(
    model: nn.Module,
    *,
    keeps: Sequence[Keep] = KEEPS,
    tokens: int = 65536,
    sequence_length: int = 1024,
    batch_size: int = 1,
    guard_tokens: int = 0,
    recipe: AnyRecipe | None = None,
    runtime: Runtime | None = None,
    **overrides: Any,
) -> Inspection:
    """Lists a model's sites and predicts what a run costs.

    Args:
        keeps: shares for the table of savings, each in a form that `grail.Recipe` takes.
        tokens, sequence_length, batch_size: the calibration set; sequences no longer than what the
            model has positions for.
        guard_tokens: of guard text, in sequences and batches of the same size.
        recipe, runtime, overrides: of the predicted run, see `grail.compress`; default the default
            recipe on every kind of site. With `onload`, memory is that of the device where the
            blocks run.

    Raises:
        ModelError: a model of no known family.
        InputError: a keep that is not allowed.
    """
    require_model(model)
    asked, runtime = merged("default" if recipe is None else recipe, runtime, overrides)
    check_kind("keeps", keeps, Iterable, "a list of shares")
    require_whole("tokens", tokens, 0)
    require_whole("guard_tokens", guard_tokens, 0)
    require_whole("sequence_length", sequence_length, 1)
    require_whole("batch_size", batch_size, 1)
    sequence_length = min(sequence_length, positions(model) or sequence_length)
    architecture = find(model, asked.sites)
    if recipe is None and asked.sites is None:
        asked = replace(asked, sites=architecture.kinds)
    sites = asked.all_sites(architecture)
    parameters, size = _size(model)
    with Transaction() as transaction:
        if asked.fit_bias:  # as a run does first: the biases are part of what it leaves
            architecture.ensure_biases(sites, transaction)
        savings = [_saving(model, architecture, asked, sites, keep) for keep in keeps]
        needed, seconds = _cost(
            model,
            architecture,
            asked,
            (tokens, guard_tokens),
            sequence_length,
            batch_size,
            runtime.onload,
        )
        transaction.undo()
    dense = _of_kinds((site, site.width(1.0, None)) for site in sites)
    asked_widths = [(site, site.width(asked.keep_of(site), asked.multiple)) for site in sites]
    return Inspection(
        name=architecture.name,
        parameters=parameters,
        bytes=size,
        sites=[
            SiteKind(kind, len(widths), _structure_in_words(widths))
            for kind, widths in dense.items()
        ],
        savings=savings,
        keep=asked.keep,
        tokens=tokens,
        memory=needed,
        seconds=seconds,
        notes=refused(model, asked, asked_widths),
    )


def _size(model: nn.Module) -> tuple[int, int]:
    """Returns number and bytes of the parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def _saving(
    model: nn.Module,
    architecture: Architecture,
    recipe: Recipe,
    sites: Sequence[BoundSite],
    keep: Keep,
) -> Saving:
    """Returns a row of the table of savings, for a model with the biases of the run."""
    recipe = replace(recipe, keep=keep)
    widths = [(site, site.width(recipe.keep_of(site), recipe.multiple)) for site in sites]
    parameters, size = _size(model)
    saved = _saved(widths)
    return Saving(
        keep,
        {kind: _width_in_words(found) for kind, found in _of_kinds(widths).items()},
        parameters - saved,
        size - saved * architecture.element_size,
        fits(widths) if generates(model) else {},
    )


def _cost(
    model: Any,
    architecture: Architecture,
    recipe: Recipe,
    tokens: tuple[int, int],
    sequence_length: int,
    batch_size: int,
    onload: torch.device | str | None,
) -> tuple[dict[str, int], dict[str, float]]:
    """Returns memory and seconds of an `Inspection`.

    Args:
        tokens: of calibration and guard text.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    decodes = generates(model) and not getattr(model.config, "is_encoder_decoder", False)
    if not hasattr(embeddings, "num_embeddings") or not (architecture.trusted or decodes):
        return {}, {}
    device = computing_device(model, onload)
    in_use = memory.in_use(device)
    trial = _trial(model, batch_size, sequence_length)
    others = {Role.GUARD: trial} if tokens[1] else {}
    enter = partial(Stream, model, architecture.blocks, trial, device=device, others=others)
    with eval_no_grad(model):
        stream = enter(storage=device if onload is None else "cpu")
        predicted = peak_memory.predict(
            architecture,
            recipe,
            stream,
            Clock(device),
            onloads=onload is not None,
            growth=sum(tokens) / stream.own_tokens,
        )
    storage, keeps_inputs = torch.device("cpu"), device.type == "cpu"
    if onload is None:
        storage, keeps_inputs = peak_memory.waiting_place(predicted, device, held=0)
    parts = {"in use now": in_use}
    if predicted is not None:
        parts |= predicted.parts(storage.type == device.type, keeps_inputs)
    onloader = Onloader(architecture.blocks, None if onload is None else device)
    enter = partial(enter, storage=storage)
    seconds = _seconds(model, architecture, recipe, sum(tokens), enter, onloader)
    return {**parts, "peak": sum(parts.values())}, seconds


def _saved(widths: Sequence[tuple[BoundSite, Width]]) -> int:
    """Returns the number of parameters that a model loses at these widths of its sites."""
    total = sum(site.parameters_saved(width) for site, width in widths)
    rows: Counter[nn.Module] = Counter()  # that each layer loses
    for site, width in widths:
        for producer in site.producers:
            rows[producer.module] += len(producer.rows()) * (width.channels - width.kept)
    for site, width in widths:
        for consumer in site.consumers:
            # A layer between two sites loses rows and columns; where they cross, only once.
            taps = consumer.taps / consumer.groups
            total -= round((width.channels - width.kept) * taps * rows[consumer.module])
    return total


def by_kind(values: Iterable[tuple[BoundSite, Any]]) -> dict[str, Any]:
    """Returns one value for each kind of site if it is the same for all, else one a site."""
    found: dict[str, dict[str, Any]] = {}
    for site, value in values:
        found.setdefault(site.kind, {})[site.name] = value
    merged: dict[str, Any] = {}
    for kind, of_sites in found.items():
        same = len(set(of_sites.values())) == 1
        merged |= {kind: next(iter(of_sites.values()))} if same else of_sites
    return merged


def _of_kinds(widths: Iterable[tuple[BoundSite, Width]]) -> dict[str, list[Width]]:
    found: dict[str, list[Width]] = {}
    for site, width in widths:
        found.setdefault(site.kind, []).append(width)
    return found


def _width_in_words(widths: Sequence[Width]) -> str:
    """Returns the width of a kind of site; its range and mean share if widths differ."""
    if len(set(widths)) == 1:
        return str(widths[0])
    kept, channels = ([getattr(w, name) for w in widths] for name in ("kept", "channels"))
    return f"{_range(kept)} of {_range(channels)} channels, {sum(kept) / sum(channels):.0%} of all"


def _structure_in_words(widths: Sequence[Width]) -> str:
    """Returns the same of a kind before narrowing."""
    if len(set(widths)) == 1:
        return widths[0].structure
    channels = [width.channels for width in widths]
    return f"{_range(channels)} channels, {statistics.mean(channels):.0f} on average"


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least}" if least == most else f"{least}–{most}"


def _trial(model: Any, batch_size: int, sequence_length: int) -> list[torch.Tensor]:
    """Returns random token ids: two batches, so that one can be held out."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, sequence_length)
    return [torch.randint(vocabulary, shape, generator=generator) for _ in range(2)]


def _seconds(
    model: Any,
    architecture: Architecture,
    recipe: Recipe,
    tokens: int,
    enter: Callable[[], Stream],
    onloader: Onloader,
) -> dict[str, float]:
    blocks = len(architecture.blocks)
    phases: dict[str, float] = {}
    for _ in range(2):  # the first time warms up
        with eval_no_grad(model), Transaction() as transaction:
            stream = enter()
            clock = Clock(stream.device)
            compressor = BlockCompressor(
                Blocks(architecture, recipe, stream, clock, onloader), transaction
            )
            if not compressor.blocks.is_idle:
                # Not the first: what runs before all sites never drifts, and is never corrected.
                compressor.compress(min(1, blocks - 1), ignore)
            transaction.undo()
        repeats = -(-tokens // stream.own_tokens)
        each = {"forward": repeats, "gram": repeats, "refit": repeats}
        phases = {k: v * blocks * each.get(k, 1) for k, v in clock.seconds.items()}
    return {**phases, "total": sum(phases.values())}
