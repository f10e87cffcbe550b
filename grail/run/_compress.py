"""The main verb: `compress` a model in place and report what was done."""

import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import nn

from grail import select
from grail.algebra._fit import ALPHA, check_guard
from grail.arguments import require_batches, require_model
from grail.calibrate.batches import Batch
from grail.calibrate.stream import Role, Stream
from grail.errors import InputError, NonFiniteError
from grail.networks import Architecture, BoundSite, find
from grail.recipe import AnyRecipe, Keep, Recipe, Sites, merged
from grail.report.report import LayerReport, Report, SiteReport
from grail.run import peak_memory, resume_folder
from grail.run._collect import Collected
from grail.run._inspect import by_kind
from grail.run.block import BlockCompressor
from grail.run.blocks import Blocks
from grail.run.checkpoint import Checkpoint
from grail.run.fingerprint import HashedBatches, run_fingerprint, with_calibration
from grail.run.loop import Run
from grail.run.peak_memory import PeakMemory
from grail.run.producer_refit import refusal
from grail.run.quantizer import forget_grids, require_quantisable, round_embeddings
from grail.run.served import WidthWarning, refused
from grail.runtime import memory
from grail.runtime.clock import Clock
from grail.runtime.onload import Onloader, computing_device
from grail.runtime.processes import (
    Processes,
    checksum,
    current_processes,
    refuse_sharded,
)
from grail.runtime.settings import Runtime
from grail.runtime.transaction import Transaction, eval_no_grad


@torch.inference_mode(False)  # what is made in it could never be trained
def compress(
    model: nn.Module,
    batches: Iterable[Batch] | Collected,
    keep: Keep | None = None,
    sites: Sites = None,
    selector: str | select.Selector | None = None,
    *,
    guard: Iterable[Batch] | None = None,
    select_on: Iterable[Batch] | None = None,
    recipe: AnyRecipe = "default",
    runtime: Runtime | None = None,
    **overrides: Any,
) -> Report:
    """Narrows `model` in place and rebuilds the removed channels' signal from the kept ones.

    Args:
        model: a network of a supported family (`grail.networks.supported()`), or any other whose
            sites are named.
        batches: calibration, read once: LongTensor [B, L] of token ids, images [B, C, H, W],
            tuples of the model's arguments, or mappings of its keyword arguments, where an
            `attention_mask` marks the tokens that count. Or `grail.Collected(folder)`, statistics
            that `grail.collect` wrote, for the open loop.
        keep, sites, selector: see `grail.Recipe`; where given, instead of the recipe's.
        guard: batches of a second kind of text, on which no site's output becomes worse than plain
            pruning's. They run through the network as the calibration does and are never fitted:
            they choose, together with its held-out sequences, what is "auto" (see `grail.fit`).
            Needs `compensate` and an automatic `alpha`.
        select_on: batches by which channels are selected, instead of the calibration, which
            then only fits.
        recipe: a `grail.Recipe`, the name of a preset ("default", "paper", "prune", "flap",
            "slimgpt"), or the path of a recipe file.
        runtime: how the run is computed; default `grail.Runtime()`.
        overrides: single settings of recipe and runtime by name, such as `alpha=1e-3` or
            `progress=False`.

    Returns:
        A `Report`; the model is changed in place.

    Raises:
        InputError, ModelError, EmptyCalibrationError, NonFiniteError: the model is as it was.
        SolveError, StateError, OutOfMemoryError, RankError: the model is as it was.

    Warns:
        WidthWarning: widths of a language model that no usual group of quantisers divides.

    In an initialised `torch.distributed` group all processes call this alike, with the same model
    and the same batches, and end with the same bits: see `grail.runtime.processes`.

    Source: GRAIL (arXiv 2602.23795), algorithm 1.
    """
    require_model(model)
    recipe, runtime = merged(recipe, runtime, overrides, keep=keep, sites=sites, selector=selector)
    by_role = _texts(batches, recipe, {Role.GUARD: guard, Role.SELECT: select_on})
    refuse_sharded(model)
    device = computing_device(model, runtime.onload)
    processes = current_processes()
    architecture = find(model, recipe.sites)
    dense = _Dense(model, architecture, recipe)
    _require_finite_weights(dense.sites)
    _require_places(recipe, architecture, dense.sites)
    if recipe.quantize:
        require_quantisable(architecture, recipe, model)
    _warn(dense.refused, processes)
    onloader = Onloader(architecture.blocks, None if runtime.onload is None else device)
    in_use = memory.in_use(device)
    clock = Clock(device)

    with (
        memory.explain_oom(device, lambda: clock.failed, runtime.onload is None),
        memory.Peak(device) as peak,
        Transaction() as transaction,
        eval_no_grad(model),
        processes.together(),
        resume_folder.opened(runtime.resume_dir, recipe, processes) as folder,
        clock("other"),
    ):
        checkpoint = known = None
        fingerprint = {} if folder is None else run_fingerprint(model, recipe)
        rounded = _round_ends(model, recipe, transaction)
        if isinstance(batches, Collected):
            if folder is not None or processes.count > 1:
                raise InputError("collected statistics are for one process, without resume_dir")
            stream = batches.stream(model, architecture, recipe, device)
            known = partial(batches.statistics, recipe=recipe, stream=stream)
        else:
            needed = folder is not None or processes.count > 1
            texts = {role: HashedBatches(text, needed) for role, text in by_role.items()}
            with clock("forward"):
                stream = _stream(
                    model, architecture, texts, runtime.storage, device, processes, recipe
                )
            if folder is not None:
                fingerprint = with_calibration(fingerprint, texts.pop(Role.TRAIN), _named(texts))
                checkpoint = Checkpoint(folder, fingerprint, model, transaction, processes)
        if recipe.fit_bias:
            architecture.ensure_biases(dense.sites, transaction)
        peak.update()
        predicted = peak_memory.predict(
            architecture, recipe, stream, clock, onloads=runtime.onload is not None, known=known
        )
        _place(stream, runtime, predicted)
        blocks = Blocks(architecture, recipe, stream, clock, onloader, known)
        run = Run(BlockCompressor(blocks, transaction), checkpoint)
        run.compress(runtime.progress)
        architecture.write_config(dense.sites, dense.widths, transaction)

    return Report(
        settings=recipe.as_dict(),
        model=dense.compared(model, device),
        calibration=_counts(stream),
        sites=run.rows,
        inputs=run.inputs,
        quantized=[*rounded, *run.quantized],
        seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        memory=_memory(in_use, predicted, peak.bytes, stream),
        resumed=run.resumed,
        notes=[*_notes(recipe, dense, stream, run.rows), *run.notes, *dense.notes()],
        versions=_versions(),
    )


def _round_ends(model: nn.Module, recipe: Recipe, transaction: Transaction) -> list[LayerReport]:
    """Forgets the grids of an earlier run; rounds the embeddings of one that quantises."""
    forget_grids(model, transaction)
    return round_embeddings(model, transaction) if recipe.quantize else []


class _Dense:
    """A model before the run, for its report.

    `sites` and `widths`: see `Recipe`. `asked`: by kind, the share that was asked for, and the
    width that the structure allows. `refused`: sentences about widths that quantisers refuse.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, recipe: Recipe):
        self._architecture, self._recipe = architecture, recipe
        self.widths = recipe.widths(architecture)
        self.sites = recipe.all_sites(architecture)
        self.asked = by_kind(
            (site, (recipe.keep_of(site), self.widths[site.name])) for site in self.sites
        )
        self.refused = refused(model, recipe, [(s, self.widths[s.name]) for s in self.sites])
        self._size = _size(model, self.sites)

    def notes(self) -> list[str]:
        """Returns sentences about what the configuration cannot hold."""
        return self._architecture.notes(self.sites, self.widths)

    def compared(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Returns a description of the model with its sizes before the run and now."""
        now = _size(model, self._recipe.all_sites(self._architecture))
        return {
            "name": getattr(getattr(model, "config", None), "_name_or_path", ""),
            "class": type(model).__name__,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": str(device),
            **{key: {"before": self._size[key], "after": now[key]} for key in now},
            "beyond_configuration": self._architecture.beyond_configuration(
                self.sites, self.widths
            ),
        }


def _counts(stream: Stream) -> dict[str, Any]:
    """Returns the numbers of the calibration's tokens and sequences, and their greatest length."""
    fitted = (stream.hidden[batch] for batch in stream.batches if stream.fits(batch))
    lengths = (h.shape[1] if stream.has_sequences(h) else 1 for h in fitted)
    return {
        "tokens": stream.tokens,
        "sequences": stream.samples,
        "sequence_length": max(lengths, default=None),
        **{f"{role.value}_tokens": tokens for role, tokens in stream.tokens_by_role.items()},
    }


def _stream(
    model: nn.Module,
    architecture: Architecture,
    texts: Mapping[Role, HashedBatches],
    storage: torch.device | str,
    device: torch.device,
    processes: Processes,
    recipe: Recipe,
) -> Stream:
    """Returns the calibration set, and other text, at the model's entry.

    Raises:
        InputError: the model, settings or batches differ between processes.
    """
    room = None
    if storage == "auto":
        storage = architecture.device  # the host, if blocks are brought from there
        # For one set of hidden states; a run has up to four.
        room = memory.free(device) // 4 if storage.type == "cuda" else None
    settings = {key: value for key, value in recipe.as_dict().items() if key != "selector"}
    processes.require_equal("the settings", settings)
    if processes.count > 1:
        processes.require_equal("the model", checksum(model.parameters()))
    others = dict(texts)
    calibration = others.pop(Role.TRAIN)
    blocks = architecture.blocks
    stream = Stream(model, blocks, calibration, storage, processes, device, room, others)
    for name, text in _named(texts).items():
        processes.require_equal(f"the {name}", text.sha256)
    return stream


def _texts(
    batches: Iterable[Batch] | Collected,
    recipe: Recipe,
    others: Mapping[Role, Iterable[Batch] | None],
) -> dict[Role, Iterable[Batch]]:
    """Returns the batches by role; none where statistics were collected.

    Raises:
        InputError: what are no batches, or batches that no run could use.
    """
    given = {role: text for role, text in others.items() if text is not None}
    for text in (*given.values(), *(() if isinstance(batches, Collected) else (batches,))):
        require_batches(text)
    if given and isinstance(batches, Collected):
        raise InputError(
            "collected statistics come without batches, and guard text and select_on run through "
            "the network with them: give batches of the calibration, or leave these out"
        )
    if Role.GUARD in given:
        check_guard(recipe.alpha, recipe.compensate)
    return given if isinstance(batches, Collected) else {Role.TRAIN: batches, **given}


def _named(texts: Mapping[Role, HashedBatches]) -> dict[str, HashedBatches]:
    """Returns the texts of a run by what messages call them."""
    names = {Role.TRAIN: "calibration"}
    return {names.get(role, f"{role.value} text"): text for role, text in texts.items()}


def _place(stream: Stream, runtime: Runtime, predicted: PeakMemory | None) -> None:
    """Moves hidden states to the host if they and the run do not fit on the device."""
    if stream.storage.type == "cpu":
        return
    held = sum(hidden.nbytes for hidden in stream.hidden)
    place, keeps_inputs = peak_memory.waiting_place(predicted, stream.device, held)
    if not keeps_inputs:
        stream.forbid_inputs()
    if runtime.onload is None and runtime.storage == "auto":
        stream.rest_on(place)


def _memory(
    in_use: int, predicted: PeakMemory | None, measured: int, stream: Stream
) -> dict[str, int]:
    """Returns the bytes of the report; both peaks include what was in use before the run."""
    here = stream.storage.type == stream.device.type
    peak = 0 if predicted is None else in_use + predicted.total(here, stream.keeps_inputs)
    found = {"predicted_peak": peak, "measured_peak": measured}
    processes = stream.processes
    return found | ({"sent": processes.sent} if processes.count > 1 else {})


def _require_places(recipe: Recipe, architecture: Architecture, sites: Sequence[BoundSite]) -> None:
    """Raises InputError for a setting of layers that the network does not have."""
    blocks = range(len(architecture.blocks))
    if recipe.repair and not any(map(architecture.norms, blocks)):
        raise InputError(f"repair resets batch norms; {architecture.name} has none")
    if recipe.token_weights is True and not any(s.probe and s.probe.normalised for s in sites):
        raise InputError(
            f"token_weights is for sites after which norms read the stream, token by token; "
            f"{architecture.name} has none"
        )
    reasons = {refusal(site, recipe.per_tap) for site in sites}
    if recipe.refit_producers and "" not in reasons:
        raise InputError(
            f"refit_producers cannot be applied to any site to narrow of {architecture.name}: "
            f"{'; '.join(sorted(reasons))}; choose refit_producers=0"
        )
    if recipe.correct_attention and not any(map(architecture.attention_inputs, blocks)):
        raise InputError(
            f"correct_attention is for transformers whose projections to queries, keys and values "
            f"are plain layers; {architecture.name} has none"
        )


def _warn(refused: Sequence[str], processes: Processes) -> None:
    """Warns the caller of `compress` about widths, in one of several processes."""
    if refused and processes.number == 0:
        warnings.warn("; ".join(refused), WidthWarning, stacklevel=4)


def _require_finite_weights(sites: Sequence[BoundSite]) -> None:
    for site in sites:
        for name, module in site.modules().items():
            for key, weight in module.named_parameters(recurse=False):
                bad = ~weight.detach().isfinite()
                if bool(bad.any()):
                    rows = bad.flatten(1).any(1) if bad.dim() > 1 else bad
                    raise NonFiniteError(
                        f"{key} of {name}", rows.nonzero().flatten().tolist(), int(bad.sum())
                    )


def _size(model: nn.Module, sites: Sequence[BoundSite]) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "widths": by_kind((site, site.channels) for site in sites),
    }


def _notes(
    recipe: Recipe,
    dense: _Dense,
    stream: Stream,
    rows: list[SiteReport],
) -> list[str]:
    notes = []
    if recipe.holds_out and not stream.chooses:
        instead = [f"alpha={ALPHA:g}"] if recipe.alpha == "auto" else []
        if recipe.follows_drift and recipe.drift_correction == "auto":
            instead.append("drift_correction=0")
        notes.append(
            "nothing could be held out, for want of a second sequence: what is auto was "
            + " and ".join(instead)
        )
    for name, (keep, width) in dense.asked.items():
        got = width.kept / width.channels
        if abs(keep - got) > 5e-4:
            notes.append(
                f"{name}: keep={keep:g} is not feasible; the nearest width was used, "
                f"{width} = {got:.3f}"
            )
    notes += dense.refused
    notes += [
        f"{row.name}: the Cholesky needed {row.retries} larger damping(s), λ = {row.damping:.3g}"
        for row in rows
        if row.retries
    ]
    notes += _notes_on_guard(rows)
    if recipe.repair:
        notes.append("repair: errors are those before the batch norms were reset")
    return notes


def _notes_on_guard(rows: Sequence[SiteReport]) -> list[str]:
    """Returns a sentence on the sites where guard text left less to compensate."""
    guarded = [row for row in rows if row.guard_share is not None and row.kept < row.channels]
    plain = sum(row.alpha is None for row in guarded)
    less = sum(row.alpha is not None and (row.guard_share or 0.0) < 1 for row in guarded)
    if not plain + less:
        return []
    return [
        f"guard text: of {len(guarded)} consumers {plain} were only pruned and {less} keep a part "
        "of what was fitted, so that none is worse than pruned"
    ]


def _versions() -> dict[str, str]:
    packages = ("grail-kernels", "torch", "triton", "transformers", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
