"""The main verb: `compress` a model in place and report what was done."""

import platform
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import nn

from grail import select
from grail.algebra._fit import ALPHA
from grail.algebra.width import Width
from grail.arguments import require_batches, require_model
from grail.calibrate.stream import Batch, Stream
from grail.errors import InputError, NonFiniteError
from grail.networks import Architecture, BoundSite, find
from grail.recipe import AnyRecipe, Keep, Recipe, Sites, merged
from grail.report.report import Report, SiteReport
from grail.run import _inspect as plan
from grail.run import checkpoint
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
        recipe: a `grail.Recipe`, the name of a preset ("default", "paper", "prune", "flap",
            "slimgpt"), or the path of a recipe file.
        runtime: how the run is computed; default `grail.Runtime()`.
        overrides: single settings of recipe and runtime by name, such as `alpha=1e-3` or
            `progress=False`.

    Returns:
        A `Report`; the model is changed in place.

    Raises:
        InputError, ModelError, EmptyCalibrationError, NonFiniteError, SolveError, StateError,
        OutOfMemoryError, RankError: the model is as it was.

    In an initialised `torch.distributed` group all processes call this alike, with the same model
    and the same batches, and end with the same bits: see `grail.runtime.processes`.

    Source: GRAIL (arXiv 2602.23795), algorithm 1.
    """
    require_model(model)
    if not isinstance(batches, Collected):
        require_batches(batches)
    recipe, runtime = merged(recipe, runtime, overrides, keep=keep, sites=sites, selector=selector)
    refuse_sharded(model)
    device = computing_device(model, runtime.onload)
    processes = current_processes()
    architecture = find(model, recipe.sites)
    widths = recipe.widths(architecture)
    dense = recipe.all_sites(architecture)
    asked = plan.by_kind((site, (recipe.keep_of(site), widths[site.name])) for site in dense)
    _require_finite_weights(dense)
    _require_places(recipe, architecture, dense)
    onloader = Onloader(architecture.blocks, None if runtime.onload is None else device)
    in_use = memory.in_use(device)
    before = _size(model, dense)
    clock = Clock(device)

    with (
        memory.explain_oom(device, lambda: clock.failed, runtime.onload is None),
        memory.Peak(device) as peak,
        Transaction() as transaction,
        eval_no_grad(model),
        processes.together(),
        checkpoint.opened(runtime.resume_dir, model, recipe, transaction, processes) as resumed,
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
                stream = _stream(
                    model, architecture, read, runtime.storage, device, processes, recipe
                )
        if recipe.fit_bias:
            architecture.ensure_biases(dense, transaction)
        predicted = _predicted_peak(architecture, recipe, stream, runtime.onload is not None)
        run = Run(architecture, recipe, stream, transaction, clock, resumed, onloader, known)
        rows = run.all_blocks(runtime.progress)
        architecture.write_config(dense, widths, transaction)

    after = _size(model, recipe.all_sites(architecture))
    return Report(
        settings=recipe.as_dict(),
        model={
            **_described(model),
            "device": str(device),
            **{key: {"before": before[key], "after": after[key]} for key in before},
            "beyond_configuration": architecture.beyond_configuration(dense, widths),
        },
        calibration=_counted(stream),
        sites=rows,
        inputs=run.inputs,
        seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        memory={
            "predicted_peak": in_use + predicted if predicted else 0,
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
    automatic = storage == "auto"
    if automatic:
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
    if automatic and stream.storage.type != "cpu":
        held = sum(hidden.nbytes for hidden in stream.hidden)
        size = _sizes(stream)
        stream.rest_on(plan.waiting_place(architecture, recipe, *size, held))
    return stream


def _sizes(stream: Stream) -> tuple[int, int]:
    """Tokens of all batches here and of the largest; those that do not count take room, too."""
    sizes = [hidden.shape[:2].numel() for hidden in stream.hidden]
    return sum(sizes), max(sizes, default=0)


def _predicted_peak(
    architecture: Architecture, recipe: Recipe, stream: Stream, onloads: bool
) -> int:
    """Bytes that the run adds; 0 where they depend on more than shapes of weights."""
    if architecture.activations_per_token is None:
        return 0
    parts = plan.demand(
        architecture,
        recipe,
        *_sizes(stream),
        stream.storage,
        stream.device if onloads else None,
    )
    return sum(parts.values())


def _require_places(recipe: Recipe, architecture: Architecture, sites: Sequence[BoundSite]) -> None:
    """Raises InputError for a setting of layers that the network does not have."""
    blocks = range(len(architecture.blocks))
    if recipe.repair and not any(map(architecture.norms, blocks)):
        raise InputError(f"repair resets batch norms; {architecture.name} has none")
    if recipe.token_weights is True and not any(s.probe and s.probe.normalised for s in sites):
        raise InputError(
            f"token_weights is for sites behind which norms read the stream, token by token; "
            f"{architecture.name} has none"
        )
    if recipe.correct_attention and not any(map(architecture.attention_inputs, blocks)):
        raise InputError(
            f"correct_attention is for transformers whose projections to queries, keys and values "
            f"are plain layers; {architecture.name} has none"
        )


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


def _described(model: nn.Module) -> dict[str, str]:
    """The name, class and dtype of a model."""
    return {
        "name": getattr(getattr(model, "config", None), "_name_or_path", ""),
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _counted(stream: Stream) -> dict[str, int | None]:
    """The size of a calibration."""
    lengths = (h.shape[1] if stream.has_sequences(h) else 1 for h in stream.hidden)
    return {
        "tokens": stream.tokens,
        "sequences": stream.samples,
        "sequence_length": max(lengths, default=None),
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
