"""Statistics of a dense network, collected here and now, to be added to those of other machines.

    a/index.state            sites, of which model, from which calibrations
    a/0003.0.train.state     the `grail.Gram` of what the first consumer of site 3 reads
    a/0003.0.held_out.state  the same of every fifth sequence, by which what is "auto" is chosen
    a/0003.0.channels.state  of channels alone, where taps of a convolution are columns of `train`,
                             and a/0003.0.held_out_channels.state beside `held_out`

`Collected` gives such a folder to `grail.compress`, which then needs no text, any number of times;
being sums of the dense network, they are for the open loop.

Sums add up, so statistics of two halves of a calibration are those of the whole, within the
rounding of fp32 sums; counts of tokens exactly.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grail.algebra.gram import Gram, NonFinite
from grail.arguments import as_path, as_paths, require_batches, require_model
from grail.calibrate.batches import Batch
from grail.calibrate.stream import Stream
from grail.errors import InputError, StateError
from grail.networks import Architecture, BoundSite, Site, find
from grail.recipe import Recipe
from grail.run.checkpoint import fingerprint, hashed
from grail.run.loop import Run
from grail.runtime import state
from grail.runtime.clock import Clock
from grail.runtime.folder import complete
from grail.runtime.onload import Onloader, computing_device
from grail.runtime.transaction import Transaction, eval_no_grad
from grail.statistics.site_statistics import SiteStatistics, without_held_out

_INDEX, _KIND = "index.state", "statistics"


@torch.inference_mode(False)  # what is made in it could never be trained
def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Sequence[str | Site] | None = None,
    *,
    output: str | Path,
    per_tap: bool = True,
    non_finite: NonFinite = "refuse",
    storage: torch.device | str = "cpu",
    onload: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Writes what the consumers of every site read in the dense network, in one pass over it.

    Args:
        model, batches, sites, per_tap, non_finite, storage, onload, progress: see `grail.compress`.
        output: folder to create; one that exists must be empty.

    Returns:
        The path of the folder.

    Raises:
        InputError, ModelError, EmptyCalibrationError, NonFiniteError, StateError: nothing was
            written.
    """
    require_model(model)
    require_batches(batches)
    recipe = Recipe(
        1.0,
        sites,
        closed_loop=False,
        drift_correction=0,
        per_tap=per_tap,
        non_finite=non_finite,
    )
    architecture = find(model, recipe.sites)
    device = computing_device(model, onload)
    onloader = Onloader(architecture.blocks, None if onload is None else device)
    calibration: dict[str, Any] = {}
    index: dict[str, Any] = {
        "model": fingerprint(model),
        "per_tap": per_tap,
        "sites": {},
        "calibrations": [calibration],
    }
    with complete(output, StateError) as folder, Transaction() as nothing, eval_no_grad(model):
        read = hashed(batches, lambda found: calibration.update(sha256=found))
        stream = Stream(model, architecture.blocks, read, storage, device=device)
        calibration |= {"tokens": stream.tokens, "sequences": stream.samples}
        run = Run(architecture, recipe, stream, nothing, Clock(device), onload=onloader)
        for number, (site, parts) in enumerate(run.statistics(progress)):
            grams = {
                f"{number:04}.{consumer}.{name}.state": gram
                for consumer, of_consumer in enumerate(parts)
                for name, gram in of_consumer.named_grams().items()
            }
            for name, gram in grams.items():
                if gram.tokens:
                    _ = gram.energy  # refuses sums that overflowed
                gram.save(folder / name)
            index["sites"][site.name] = list(grams)
        state.write(folder / _INDEX, _KIND, index, {})
    return Path(output)


class Collected:
    """Statistics that `collect` or `merge` wrote, in the place of batches of `grail.compress`.

    Args:
        folder: that they wrote.

    Raises:
        StateError: no such folder, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = as_path("folder", folder)
        self._index = _read_index(self.folder)

    @property
    def calibrations(self) -> list[dict[str, Any]]:
        """Of each calibration that was added: tokens, sequences and sha256."""
        return [dict(calibration) for calibration in self._index["calibrations"]]

    def stream(
        self, model: nn.Module, architecture: Architecture, recipe: Recipe, device: torch.device
    ) -> Stream:
        """Stands for the calibration, of which no batch is left.

        Raises:
            InputError: statistics of another model or other sites, or options that need batches.
        """
        needs = {
            "closed_loop=False": recipe.closed_loop,
            f"per_tap={self._index['per_tap']}": recipe.per_tap != self._index["per_tap"],
            "a selector without gradients": recipe.needs_gradient,
        }
        for setting, missing in needs.items():
            if missing:
                raise InputError(
                    f"{self.folder} holds sums of the dense network, no batches: give {setting}"
                )
        if self._index["model"] != fingerprint(model):
            raise InputError(f"{self.folder} holds statistics of another model")
        names = [site.name for site in recipe.all_sites(architecture)]
        if unknown := [name for name in names if name not in self._index["sites"]]:
            raise InputError(f"{self.folder} holds no statistics of {', '.join(unknown)}")
        return _Past(model, architecture.blocks, self._index["calibrations"], device)

    def statistics(self, site: BoundSite, recipe: Recipe, stream: Stream) -> list[SiteStatistics]:
        """Those of each consumer of a site; where nothing is to be held out, of all sequences."""
        by_consumer: list[dict[str, Gram]] = [{} for _ in site.consumers]
        for file in self._index["sites"][site.name]:
            _, consumer, name, _ = file.split(".")
            by_consumer[int(consumer)][name] = Gram.load(self.folder / file, stream.device)
        stream.holds_out |= any(grams["held_out"].tokens for grams in by_consumer)
        if not recipe.holds_out:
            by_consumer = [without_held_out(grams, site.name) for grams in by_consumer]
        return [
            SiteStatistics(site, consumer, stream, recipe, grams)
            for consumer, grams in zip(site.consumers, by_consumer, strict=True)
        ]


class _Past(Stream):
    """A calibration that was collected before: its counts, no batches.

    `holds_out`: whether the statistics read so far hold a token of a held-out sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        calibrations: Sequence[Mapping[str, int]],
        device: torch.device,
    ):
        self._calibrations = calibrations
        super().__init__(model, blocks, (), device=device)

    def _count(self) -> None:
        self.own_tokens, self.holds_out = 0, False
        self.tokens, self.samples = (
            sum(calibration[count] for calibration in self._calibrations)
            for count in ("tokens", "sequences")
        )


def merge(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Adds statistics that `collect` wrote, of one model and different calibrations.

    Args:
        folders: one or more.
        output: folder to create; one that exists must be empty.

    Returns:
        The path of the folder.

    Raises:
        InputError: other models or sites, or a calibration that would count twice.
        StateError: a damaged file; nothing was written.
    """
    paths = as_paths("folders", folders)
    indexes = [_read_index(path) for path in paths]
    calibrations: dict[str, dict[str, Any]] = {}
    for path, index in zip(paths, indexes, strict=True):
        for part in ("model", "per_tap", "sites"):
            if index[part] != indexes[0][part]:
                raise InputError(f"{path} and {paths[0]} cannot be added: {part} differ")
        for calibration in index["calibrations"]:
            if calibration["sha256"] in calibrations:
                raise InputError(f"{path} holds a calibration that would then count twice")
            calibrations[calibration["sha256"]] = calibration
    with complete(output, StateError) as folder:
        for name in itertools.chain(*indexes[0]["sites"].values()):
            total = Gram.load(paths[0] / name)
            for path in paths[1:]:
                total.merge(Gram.load(path / name))
            total.save(folder / name)
        index = {**indexes[0], "calibrations": list(calibrations.values())}
        state.write(folder / _INDEX, _KIND, index, {})
    return Path(output)


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / _INDEX).is_file():
        raise StateError(
            f"{folder} holds no statistics: there is no {folder / _INDEX}; give a folder that "
            "grail stats collect or grail stats merge wrote"
        )
    return state.read(folder / _INDEX, _KIND).content
