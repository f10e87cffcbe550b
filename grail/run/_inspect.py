"""What a run would save and cost, before it runs: `inspect`, and the prediction of peak memory.

Memory is arithmetic on shapes (`demand`). Time is measured: one block is compressed on two made-up
batches, rolled back, and scaled by the number of blocks and batches.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import grail_kernels as gk
from grail.algebra._fit import peak_bytes
from grail.algebra.expert_grams import WAITING_TOKENS
from grail.algebra.width import Width
from grail.arguments import require_model, require_whole
from grail.calibrate.stream import Stream
from grail.files.load import positions
from grail.networks import Architecture, BoundSite, CalibrationPoint, find, grouped
from grail.recipe import AnyRecipe, Recipe, merged
from grail.run.block import BlockCompressor
from grail.run.blocks import Blocks
from grail.runtime import memory
from grail.runtime.clock import Clock
from grail.runtime.onload import Onloader, computing_device, largest_block
from grail.runtime.settings import Runtime
from grail.runtime.transaction import Transaction, eval_no_grad
from grail.select import cholesky, elimination, greedy
from grail.statistics.collector import ignore
from grail_kernels import BUFFER_TOKENS, check_kind

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)


# Of a GPU's free memory, what a run may be predicted to take with its hidden states there: the
# prediction is good to a tenth, and an allocator's memory comes in pieces.
ROOM = 0.8


@dataclass(frozen=True)
class SiteKind:
    """All sites of one kind: how many, and how wide each is, or their range, in words."""

    kind: str
    count: int
    structure: str


@dataclass(frozen=True)
class Saving:
    """What one keep ratio leaves: widths in words by kind; the model's parameters and bytes."""

    keep: float
    widths: dict[str, str]
    parameters: int
    bytes: int


@dataclass(repr=False)
class Inspection:
    """Sites, savings and the predicted cost of a run. Nothing was changed to find out.

    `memory`: bytes by part, and their "peak"; `seconds`: by phase, and their "total". Both are
    empty for a model that does not read token ids.
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

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.count} × {site.kind}" for site in self.sites)
        cost = ""
        if self.memory and self.seconds:
            cost = f", peak {self.memory['peak'] / 1e9:.3g} GB, {self.seconds['total']:.3g} s"
        return f"Inspection({self.name}, {self.parameters:,} parameters, {sites}{cost})"


def inspect(
    model: nn.Module,
    *,
    keeps: Sequence[float] = KEEPS,
    tokens: int = 65536,
    sequence_length: int = 1024,
    batch_size: int = 1,
    recipe: AnyRecipe | None = None,
    runtime: Runtime | None = None,
    **overrides: Any,
) -> Inspection:
    """Lists a model's sites and predicts what a run costs.

    Args:
        keeps: ratios for the table of savings.
        tokens, sequence_length, batch_size: the calibration set; sequences no longer than what the
            model has positions for.
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
            model, architecture, asked, tokens, sequence_length, batch_size, runtime.onload
        )
        transaction.undo()
    dense = _of_kinds((site, site.width(1.0, None)) for site in sites)
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
    )


def _size(model: nn.Module) -> tuple[int, int]:
    """Number and bytes of the parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def _saving(
    model: nn.Module,
    architecture: Architecture,
    recipe: Recipe,
    sites: Sequence[BoundSite],
    keep: float,
) -> Saving:
    """One row of the table of savings, of a model that has room for the biases of the run."""
    widths = [(site, site.width(keep, recipe.multiple)) for site in sites]
    parameters, size = _size(model)
    saved = _saved(widths)
    return Saving(
        keep,
        {kind: _width_in_words(found) for kind, found in _of_kinds(widths).items()},
        parameters - saved,
        size - saved * architecture.element_size,
    )


def _cost(
    model: Any,
    architecture: Architecture,
    recipe: Recipe,
    tokens: int,
    sequence_length: int,
    batch_size: int,
    onload: torch.device | str | None,
) -> tuple[dict[str, int], dict[str, float]]:
    """Memory and seconds of an `Inspection`."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if not hasattr(embeddings, "num_embeddings") or architecture.activations_per_token is None:
        return {}, {}
    device = computing_device(model, onload)
    brought = None if onload is None else device
    storage, size_of_batch = torch.device("cpu"), batch_size * sequence_length
    if onload is None:
        storage = waiting_place(architecture, recipe, tokens, size_of_batch)
    parts = {
        "in use now": memory.in_use(device),
        **demand(architecture, recipe, tokens, size_of_batch, storage, brought),
    }
    onloader = Onloader(architecture.blocks, brought)
    trial = _trial(model, batch_size, sequence_length)
    enter = partial(Stream, model, architecture.blocks, trial, storage, device=device)
    seconds = _seconds(model, architecture, recipe, tokens, enter, onloader)
    return {**parts, "peak": sum(parts.values())}, seconds


def _saved(widths: Sequence[tuple[BoundSite, Width]]) -> int:
    """How many parameters fewer a model has at these widths of its sites."""
    total = sum(site.parameters_saved(width) for site, width in widths)
    writers = {p.module: width for site, width in widths for p in site.producers}
    for site, width in widths:
        for consumer in site.consumers:
            # A layer between two sites loses rows and columns; where they cross, only once.
            if (behind := writers.get(consumer.module)) is not None:
                crossing = (width.channels - width.kept) * (behind.channels - behind.kept)
                total -= crossing * consumer.taps
    return total


def by_kind(values: Iterable[tuple[BoundSite, Any]]) -> dict[str, Any]:
    """One value for each kind of site where it is the same for all, else one for each site."""
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
    """The width of a kind of site; its range and mean share where it is not the same for all."""
    if len(set(widths)) == 1:
        return str(widths[0])
    kept, channels = ([getattr(w, name) for w in widths] for name in ("kept", "channels"))
    return f"{_range(kept)} of {_range(channels)} channels, {sum(kept) / sum(channels):.0%} of all"


def _structure_in_words(widths: Sequence[Width]) -> str:
    """The same of a kind before narrowing."""
    if len(set(widths)) == 1:
        return widths[0].structure
    channels = [width.channels for width in widths]
    return f"{_range(channels)} channels, {statistics.mean(channels):.0f} on average"


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least}" if least == most else f"{least}–{most}"


def demand(
    architecture: Architecture,
    recipe: Recipe,
    tokens: int,
    batch_tokens: int,
    storage: torch.device | str = "cpu",
    onload: torch.device | None = None,
) -> dict[str, int]:
    """Bytes that a run adds where its blocks run, by part; their sum is its peak.

    hidden states   tokens · hidden, and as much again for an MLP's upstream outputs that are kept
                    for the second pass, for the dense stream, and for what that holds after each
                    site within a block and where attention reads it; where `storage` is the model's
                    device
    blocks          two of them, the largest, where they are brought from the host one by one
    weights         the narrowed layers, beside the dense ones that an error would bring back; those
                    of one block at a time where the others are on the host
    statistics      packed Grams 2H² of a block (one site's in the closed loop), drift 4·O·H, twice
                    if sequences are held out, and on a GPU the tokens that wait for one; those
                    of experts twice, for they are sorted
    working set     the largest of a batch's activations (on a GPU with what fp32 ones are taken
                    apart into), of a solve in fp64 and of a search for channels

    Not counted: attention masks of padded batches, what a GPU lays those batches out into (two
    bytes a value of 8192 tokens of a site), and what k-means holds. An exact folding takes
    up to two fifths less: what is counted is the fit of an inexact one.
    """
    widths = recipe.widths(architecture)
    blocks = [recipe.active(sites, widths) for sites in recipe.sites_of(architecture)]
    first, element = blocks[0], architecture.element_size
    entries = architecture.attention_inputs(0) if recipe.correct_attention else []
    assert architecture.hidden_size is not None
    assert architecture.activations_per_token is not None
    hidden = tokens * architecture.hidden_size * element
    kept_outputs = recipe.closed_loop and any(s.upstream for s in first[-1:])
    streams = 1 + kept_outputs
    if recipe.follows_drift:
        streams += 1 + sum(not s.probes_output for s in first) + len(entries)
    folds = str(recipe.selector).startswith("folding")
    if folds and recipe.folds_exactly and recipe.drift_correction not in ("auto", 1):
        # What a folded block is to hold: its own outputs, and those where its site lands.
        streams += 1 + any(not s.probes_output for s in first)
    device = onload or architecture.device
    elsewhere = device.type != architecture.device.type  # where blocks wait, not where they run
    on_gpu = device.type == "cuda"

    def collected(point: CalibrationPoint, outputs: int) -> int:
        waiting = on_gpu * (2 * WAITING_TOKENS if point.group else BUFFER_TOKENS) * element
        drift = 4 * recipe.follows_drift * outputs
        of_one = 4 * gk.packed_numel(point.channels) + (waiting + drift) * point.channels
        return (1 + recipe.holds_out) * of_one

    grams = [sum(collected(s, s.outputs) for s in step) for step in grouped(first)]
    grams += [collected(entry, entry.channels) for entry in entries]
    stored_here = torch.device(storage).type == device.type
    solves = [
        peak_bytes(
            s.channels,
            widths[s.name].kept,
            s.outputs,
            folding=folds,
            drift=recipe.follows_drift,
            held_out=recipe.holds_out,
            affine=recipe.fit_bias,
        )
        for s in first
    ]
    solves += [
        peak_bytes(e.channels, e.channels, e.channels, drift=True, held_out=recipe.holds_out)
        for e in entries
    ]
    solves += [16 * layer.outputs * layer.channels for e in entries for layer in e.layers]  # W M
    searches: dict[Any, Any] = {
        "greedy": greedy,
        "slimgpt": elimination,
        "backward": elimination,
        "cholesky": cholesky,
    }
    selections = [
        searches[recipe.selector].peak_bytes(s.channels, widths[s.name].kept, s.outputs)
        for s in first
        if recipe.selector in searches
    ]

    def rewritten(site: BoundSite) -> int:
        if widths[site.name].kept == site.channels:  # then only the consumers change
            return site.outputs * site.channels
        whole = sum(p.numel() for m in site.modules().values() for p in m.parameters())
        return whole - site.parameters_saved(widths[site.name])

    largest_batch = batch_tokens * architecture.activations_per_token * element
    if (
        on_gpu and element == torch.float32.itemsize
    ):  # three parts of bf16, `gram_tma` of the kernels
        largest_batch += 6 * BUFFER_TOKENS * max((s.channels for s in first), default=0)
    # Those that a site narrows as well leave nothing behind.
    of_sites = {module for s in first for module in s.modules().values()}
    corrected = [c for e in entries for c in e.layers if c.module not in of_sites]
    beside = sum(layer.outputs * layer.channels for layer in corrected)
    narrowed = [(sum(map(rewritten, sites)) + beside) * element for sites in blocks]
    return {
        "hidden states": hidden * streams if stored_here else 0,
        "blocks": 0 if onload is None else 2 * largest_block(architecture.blocks),
        "weights": max(narrowed) if elsewhere else sum(narrowed),
        "statistics": max(grams, default=0) if recipe.closed_loop else sum(grams),
        "working set": max([largest_batch, *solves, *selections]),
    }


def waiting_place(
    architecture: Architecture, recipe: Recipe, tokens: int, batch_tokens: int, held: int = 0
) -> torch.device:
    """Where hidden states wait between blocks: on the model's GPU if a run fits beside them.

    On the host if it does not, or if nobody can tell. A run copies them eight times a block, which
    takes a pageable memory of a host longer than an H100 takes for the block.

    Args:
        tokens, batch_tokens: see `demand`; those that do not count too.
        held: bytes of what `demand` counts that are on the GPU already.
    """
    host, device = torch.device("cpu"), architecture.device
    if device.type != "cuda" or architecture.activations_per_token is None:
        return host
    needed = sum(demand(architecture, recipe, tokens, batch_tokens, device).values()) - held
    return device if needed <= ROOM * memory.free(device) else host


def _trial(model: Any, batch_size: int, sequence_length: int) -> list[torch.Tensor]:
    """Made-up token ids: two batches, so that there is one to hold out."""
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
            if any(compressor.blocks.active):
                # Not the first: what runs before all sites never drifts, and is never corrected.
                compressor.compress(min(1, blocks - 1), ignore)
            transaction.undo()
        repeats = -(-tokens // stream.tokens)
        each = {"forward": repeats, "gram": repeats}
        phases = {k: v * blocks * each.get(k, 1) for k, v in clock.seconds.items()}
    return {**phases, "total": sum(phases.values())}
