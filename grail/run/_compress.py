"""The main verb: `compress` a model in place and report what was done."""

import platform
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grail import select
from grail.algebra._fit import Auto, Damping, Toward
from grail.algebra.gram import NonFinite
from grail.algebra.width import Width
from grail.arguments import require_batches, require_model
from grail.calibrate.stream import Batch, Stream
from grail.errors import InputError, NonFiniteError
from grail.networks import Architecture, BoundSite, Site, find
from grail.recipe import ALPHA, Compensation, Keep, Recipe, TokenWeights
from grail.report.report import Report, SiteReport
from grail.run import _inspect as plan
from grail.run import checkpoint, peak_memory
from grail.run._collect import Collected
from grail.run.loop import Run
from grail.runtime import memory
from grail.runtime.clock import Clock
from grail.runtime.onload import Onloader, computing_device
from grail.runtime.processes import (
    Processes,
    checksum,
    current_processes,
    refuse_sharded,
    watched,
)
from grail.runtime.transaction import Transaction, eval_no_grad


@torch.inference_mode(False)  # what is made in it could never be trained
def compress(
    model: nn.Module,
    batches: Iterable[Batch] | Collected,
    keep: Keep = 0.7,
    sites: Sequence[str | Site] | None = None,
    selector: str | select.Selector = "greedy",
    *,
    compensate: bool | Compensation = True,
    alpha: float | Auto = "auto",
    toward: Toward = "baseline",
    damping: Damping = "site",
    drift_correction: float | Auto = "auto",
    correct_attention: bool = False,
    token_weights: TokenWeights = "auto",
    closed_loop: bool = True,
    multiple: int | None = None,
    seed: int = 0,
    per_tap: bool = True,
    exact_folding: bool = True,
    repair: bool = False,
    non_finite: NonFinite = "refuse",
    storage: torch.device | str = "auto",
    onload: torch.device | str | None = None,
    progress: bool = True,
    resume_dir: str | Path | None = None,
) -> Report:
    """Narrows `model` in place and rebuilds what the lost channels said from the kept ones.

    Args:
        model: a network of a supported family (`grail.networks.supported()`), or any other whose
            sites are named.
        batches: calibration, read once: LongTensor [B, L] of token ids, images [B, C, H, W],
            tuples of the model's arguments, or mappings of its keyword arguments, where an
            `attention_mask` marks the tokens that count. Or `grail.Collected(folder)`, statistics
            that `grail.collect` wrote, for the open loop.
        keep: the share of each site's channels that stays, in (0, 1]; or one for each kind or
            site, {"mlp": 0.5, "heads": 0.7}, or for each block of a kind, {"mlp": [0.9, 0.8, …]}.
            The nearest width that the structure allows is used and reported.
        sites: kinds of sites ("mlp", "heads", "experts", "shared_experts", "conv"; default what
            there is of "mlp", "experts" and "conv"), or `grail.Site`s, which name the layers of a
            network.
        selector: a name of `grail.select.names()`, or a function from `grail.select.View` to a
            `Reduction`.
        compensate: "weights" (or True) fits the consumers; "bias" leaves their weights and lets
            their biases take up the means of what is lost, as FLAP does; "both" fits both at once;
            False is plain pruning (or folding).
        alpha: ridge strength relative to the Gram's mean diagonal; "auto" chooses it at each site
            by held-out sequences (every fifth).
        toward: what a strong ridge shrinks to: "baseline" (plain pruning) or "zero" (the paper).
        damping: alike for all channels of a "site" (the paper), or by each "channel"'s own energy.
        drift_correction: how much of the compressed network's drift from the dense one each
            consumer is also to undo, in [0, 1]; 0 is the paper, "auto" chooses by held-out
            sequences. Costs a forward pass of the dense blocks. "greedy" adds channels for that as
            well (see `grail.select.greedy`), where sites of one kind are narrowed.
        correct_attention: also rewrite a transformer's projections to queries, keys and values, so
            that from the compressed stream they compute what they did from the dense one, as far as
            a linear map can tell (see `grail.loop`); their widths stay as they are. Needs drift to
            be followed. Worth it for text encoders (docs/results.md); for decoders, measure.
        token_weights: count a token's error relative to the size of the dense network's stream
            where it lands, which is how the norms of a transformer see it; False, all alike, is the
            paper. "auto" does so where nothing but attention heads is narrowed: beside the drift of
            a few tokens of enormous size that of all others would not count. True needs drift to be
            followed and no bias to be fitted. Worth it for text encoders, not for decoders' MLPs
            (docs/results.md).
        closed_loop: calibrate each block behind the already compressed ones; False: on the dense
            model.
        multiple: round widths in channels to multiples of this; default 128 from 4096 channels up,
            8 from 64, else 1.
        seed: for selectors that draw.
        per_tap: fit every tap of a convolution for itself, for the least error of its output; False
            is the paper's map of channels, the same at every tap, which needs less data.
        exact_folding: fit a folding to what the folded producers write, at the cost of one more
            pass; False is the paper's.
        repair: set the batch norms of each block to the statistics of their inputs once its sites
            are done (see `grail.batchnorm`).
        non_finite: "refuse" a calibration in which a site reads NaN or Inf, or "drop" the tokens
            that hold them, with a note of how many.
        storage: where the hidden states of the calibration set wait between blocks; "auto": on a
            GPU that holds the model, if the run fits beside them (`peak_memory.waiting_place`),
            else on the host.
        onload: where the blocks of a model on the CPU run, one at a time, the next one on its way
            ("cuda"): so a model need not fit on the GPU. See `grail.onload`.
        progress: show a progress bar.
        resume_dir: a folder for the state of the run after each block. The same call after a run
            that was killed goes on where that one was, and ends with the same bits; after one that
            ended it gives the result again, until the folder is deleted.

    Returns:
        A `Report`; the model is changed in place.

    Raises:
        InputError, ModelError, EmptyCalibrationError, NonFiniteError, SolveError, StateError,
        OutOfMemoryError, RankError: the model is as it was.

    In an initialised `torch.distributed` group all processes call this alike, with the same model
    and the same batches, and end with the same bits: see `grail.distributed`.

    Source: GRAIL (arXiv 2602.23795), algorithm 1.
    """
    require_model(model)
    if not isinstance(batches, Collected):
        require_batches(batches)
    recipe = Recipe(
        keep=keep,
        sites=sites,
        selector=selector,
        compensate=compensate,
        alpha=alpha,
        toward=toward,
        damping=damping,
        drift_correction=drift_correction,
        correct_attention=correct_attention,
        token_weights=token_weights,
        closed_loop=closed_loop,
        multiple=multiple,
        seed=seed,
        per_tap=per_tap,
        exact_folding=exact_folding,
        repair=repair,
        non_finite=non_finite,
    )
    refuse_sharded(model)
    device = computing_device(model, onload)
    processes = current_processes()
    architecture = find(model, recipe.sites)
    widths = recipe.widths(architecture)
    dense = recipe.all_sites(architecture)
    asked = plan.by_kind((site, (recipe.keep_of(site), widths[site.name])) for site in dense)
    _require_finite_weights(dense)
    if recipe.repair and not any(map(architecture.norms, range(len(architecture.blocks)))):
        raise InputError(f"repair resets batch norms; {architecture.name} has none")
    if recipe.token_weights is True and not any(s.probe and s.probe.normalised for s in dense):
        raise InputError(
            f"token_weights is for sites behind which norms read the stream, token by token; "
            f"{architecture.name} has none"
        )
    if recipe.correct_attention and not any(
        map(architecture.attention_inputs, range(len(architecture.blocks)))
    ):
        raise InputError(
            f"correct_attention is for transformers whose projections to queries, keys and values "
            f"are plain layers; {architecture.name} has none"
        )
    onloader = Onloader(architecture.blocks, None if onload is None else device)
    in_use = memory.in_use(device)
    before = _size(model, dense)
    clock = Clock(device)

    with (
        memory.explain_oom(device, lambda: clock.failed, onload is None),
        memory.Peak(device) as peak,
        Transaction() as transaction,
        eval_no_grad(model),
        processes.together(),
        checkpoint.opened(resume_dir, model, recipe, transaction, processes) as resumed,
        clock("other"),
    ):
        known = None
        with clock("forward"):
            if isinstance(batches, Collected):
                if resumed is not None or processes.count > 1:
                    raise InputError("collected statistics are for one process, without resume_dir")
                stream = batches.stream(model, architecture, recipe, device)
                known = partial(batches.statistics, recipe=recipe, stream=stream)
            else:
                read = batches if resumed is None else resumed.reading(batches)
                stream = _stream(model, architecture, read, storage, device, processes, recipe)
        if recipe.shifts_bias:
            architecture.ensure_biases(dense, transaction)
        peak.update()
        onloads = onload is not None
        predicted = peak_memory.predict(
            architecture, recipe, stream, clock, onloads=onloads, known=known
        )
        if onload is None and storage == "auto" and stream.storage.type != "cpu":
            held = sum(hidden.nbytes for hidden in stream.hidden)
            stream.rest_on(peak_memory.waiting_place(predicted, device, held))
        run = Run(architecture, recipe, stream, transaction, clock, resumed, onloader, known)
        rows = run.all_blocks(progress)
        architecture.write_config(dense, widths, transaction)

    after = _size(model, recipe.all_sites(architecture))
    return Report(
        settings=recipe.as_dict(),
        model={
            "name": getattr(getattr(model, "config", None), "_name_or_path", ""),
            "class": type(model).__name__,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": str(device),
            **{key: {"before": before[key], "after": after[key]} for key in before},
            "beyond_configuration": architecture.beyond_configuration(dense, widths),
        },
        calibration={
            "tokens": stream.tokens,
            "sequences": stream.samples,
            "sequence_length": max(
                (h.shape[1] if stream.has_sequences(h) else 1 for h in stream.hidden), default=None
            ),
        },
        sites=rows,
        inputs=run.inputs,
        seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        memory={
            "predicted_peak": in_use + predicted.total(stream.storage.type == device.type)
            if predicted
            else 0,
            "measured_peak": peak.bytes,
            **({"sent": processes.sent} if processes.count > 1 else {}),
        },
        resumed=run.resumed,
        notes=[
            *_notes(recipe, asked, stream, rows),
            *run.notes,
            *architecture.notes(dense, widths),
        ],
        versions=_versions(),
    )


def _stream(
    model: nn.Module,
    architecture: Architecture,
    batches: Iterable[Batch],
    storage: torch.device | str,
    device: torch.device,
    processes: Processes,
    recipe: Recipe,
) -> Stream:
    """The calibration set at the model's entry, once all processes are known to do the same."""
    room = None
    if storage == "auto":
        storage = architecture.device  # the host, where a model is brought from there
        # Of one stream, where a run has up to four.
        room = memory.free(device) // 4 if storage.type == "cuda" else None
    enter = partial(Stream, model, architecture.blocks, storage=storage, device=device, room=room)
    if processes.count == 1:
        stream = enter(batches)
    else:
        said = {key: value for key, value in recipe.as_dict().items() if key != "selector"}
        processes.require_equal("the settings", said)
        processes.require_equal("the model", checksum(model.parameters()))
        read: list[int] = []
        stream = enter(watched(batches, read), processes=processes)
        processes.require_equal("the calibration", read)
    return stream


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
        "widths": plan.by_kind((site, site.channels) for site in sites),
    }


def _notes(
    recipe: Recipe,
    asked: dict[str, tuple[float, Width]],
    stream: Stream,
    rows: list[SiteReport],
) -> list[str]:
    notes = []
    if recipe.holds_out and not stream.holds_out:
        instead = [f"alpha={ALPHA:g}"] if recipe.alpha == "auto" else []
        if recipe.follows_drift and recipe.drift_correction == "auto":
            instead.append("drift_correction=0")
        notes.append(
            "nothing could be held out, for want of a second sequence: what is auto was "
            + " and ".join(instead)
        )
    for name, (keep, width) in asked.items():
        got = width.kept / width.channels
        if abs(keep - got) > 5e-4:
            notes.append(
                f"{name}: keep={keep:g} is not feasible; the nearest width was used, "
                f"{width} = {got:.3f}"
            )
    notes += [
        f"{row.name}: the Cholesky needed {row.retries} larger damping(s), λ = {row.damping:.3g}"
        for row in rows
        if row.retries
    ]
    if recipe.repair:
        notes.append("repair: errors are those before the batch norms were reset")
    return notes


def _versions() -> dict[str, str]:
    packages = ("grail-kernels", "torch", "triton", "transformers", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
