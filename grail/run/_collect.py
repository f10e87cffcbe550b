"""SiteStatistics of a dense network in a folder, which add up over machines.

    a/index.state            the sites, the model's fingerprint, the calibrations
    a/0003.0.train.state     the `grail.Gram` of the input of site 3's first consumer
    a/0003.0.held_out.state  the same of every fifth sequence, which choose what is "auto"
    a/0003.0.channels.state  of channels alone, if taps of a convolution are columns of `train`;
                             with a/0003.0.held_out_channels.state for `held_out`

`Collected` gives such a folder to `grail.compress` in place of batches, any number of times. The
statistics are of the dense network, so they are for the open loop.

Statistics of two halves of a calibration add up to those of the whole, within the rounding of fp32
sums; counts of tokens exactly.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grail.algebra.gram import Gram
from grail.arguments import as_path, as_paths, require_batches, require_model
from grail.calibrate.batches import Batch
from grail.calibrate.stream import Stream
from grail.errors import InputError, StateError
from grail.networks import Architecture, BoundSite, find
from grail.recipe import AnyRecipe, Recipe, Sites, merged
from grail.run.blocks import Blocks
from grail.run.fingerprint import HashedBatches, model_fingerprint
from grail.runtime import state
from grail.runtime.clock import Clock
from grail.runtime.folder import complete
from grail.runtime.onload import Onloader, computing_device
from grail.runtime.settings import Runtime
from grail.runtime.transaction import eval_no_grad
from grail.statistics.site_statistics import SiteStatistics, without_held_out

_INDEX, _KIND = "index.state", "statistics"

# Settings of a recipe on which statistics depend.
READ = ("sites", "per_tap", "non_finite")


@torch.inference_mode(False)  # what is made in it could never be trained
def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Sites = None,
    *,
    output: str | Path,
    recipe: AnyRecipe = "default",
    runtime: Runtime | None = None,
    **overrides: Any,
) -> Path:
    """Writes what the consumers of every site read in the dense network, in one pass over it.

    Args:
        model, batches, sites, recipe, runtime, overrides: see `grail.compress`. Of the recipe
            `sites`, `per_tap` and `non_finite` are read. Hidden states wait on the host where
            `storage` is "auto"; nothing is resumed.
        output: folder to create; one that exists must be empty.

    Returns:
        The path of the folder.

    Raises:
        InputError, ModelError, EmptyCalibrationError, NonFiniteError, StateError: nothing was
            written.
    """
    require_model(model)
    require_batches(batches)
    asked, runtime = merged(recipe, runtime, overrides, reads=READ, sites=sites)
    recipe = Recipe(
        keep=1.0,
        closed_loop=False,
        drift_correction=0,
        **{name: getattr(asked, name) for name in READ},
    )
    architecture = find(model, recipe.sites)
    device = computing_device(model, runtime.onload)
    onloader = Onloader(architecture.blocks, None if runtime.onload is None else device)
    index: dict[str, Any] = {
        "model": model_fingerprint(model),
        "per_tap": recipe.per_tap and _have_taps(recipe.all_sites(architecture)),
        "sites": {},
    }
    with complete(output, StateError) as folder, eval_no_grad(model):
        read = HashedBatches(batches)
        storage = "cpu" if runtime.storage == "auto" else runtime.storage
        stream = Stream(model, architecture.blocks, read, storage, device=device)
        blocks = Blocks(architecture, recipe, stream, Clock(device), onloader)
        for number, (site, parts) in enumerate(_site_statistics(blocks, runtime.progress)):
            index["sites"][site.name] = _save_grams(folder, number, parts)
        counts = {"tokens": stream.tokens, "sequences": stream.samples}
        index["calibrations"] = [{"sha256": read.sha256, **counts}]
        state.write(folder / _INDEX, _KIND, index, {})
    return Path(output)


def _site_statistics(
    blocks: Blocks, progress: bool
) -> Iterator[tuple[BoundSite, list[SiteStatistics]]]:
    """Yields each site with the statistics of its consumers in the dense network."""
    blocks.learn_orders()
    with blocks.progress(len(blocks), progress) as bar:
        for block, sites in enumerate(blocks.sites):
            bar.start(block, 1)
            with blocks.onload(block):
                collected = blocks.collector.collect(block, sites, {}, bar.advance, finish=True)
                yield from collected.items()


def _save_grams(folder: Path, number: int, parts: Sequence[SiteStatistics]) -> list[str]:
    """Writes the Grams of a site's consumers; returns the names of the files."""
    grams = {
        f"{number:04}.{consumer}.{name}.state": gram
        for consumer, of_consumer in enumerate(parts)
        for name, gram in of_consumer.named_grams().items()
    }
    for name, gram in grams.items():
        if gram.tokens:
            _ = gram.energy  # refuses sums that overflowed
        gram.save(folder / name)
    return list(grams)


def _have_taps(sites: Iterable[BoundSite]) -> bool:
    """Returns whether a consumer reads several values of a channel at once."""
    return any(consumer.taps > 1 for site in sites for consumer in site.consumers)


class Collected:
    """SiteStatistics that `collect` or `merge` wrote, for `grail.compress` in place of batches.

    Args:
        folder: their output.

    Raises:
        StateError: no such folder, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = as_path("folder", folder)
        self._index = _read_index(self.folder)

    def __repr__(self) -> str:
        return f"grail.Collected({str(self.folder)!r})"

    @property
    def calibrations(self) -> list[dict[str, Any]]:
        """The tokens, sequences and sha256 of each calibration in the sums."""
        return [dict(calibration) for calibration in self._index["calibrations"]]

    def stream(
        self, model: nn.Module, architecture: Architecture, recipe: Recipe, device: torch.device
    ) -> Stream:
        """Returns the calibration set without its batches: only its counts.

        Raises:
            InputError: statistics of another model or other sites, or settings that need batches.
        """
        sites = recipe.all_sites(architecture)
        per_tap = self._index["per_tap"]
        needs = {
            "closed_loop=False": recipe.closed_loop,
            f"per_tap={per_tap}": recipe.per_tap != per_tap and _have_taps(sites),
            "a selector without gradients": recipe.needs_gradient,
        }
        for setting, missing in needs.items():
            if missing:
                raise InputError(
                    f"{self.folder} holds sums of the dense network, no batches: give {setting}"
                )
        if self._index["model"] != model_fingerprint(model):
            raise InputError(f"{self.folder} holds statistics of another model")
        names = [site.name for site in sites]
        if unknown := [name for name in names if name not in self._index["sites"]]:
            raise InputError(f"{self.folder} holds no statistics of {', '.join(unknown)}")
        return _Past(model, architecture.blocks, self._index["calibrations"], device)

    def statistics(self, site: BoundSite, recipe: Recipe, stream: Stream) -> list[SiteStatistics]:
        """Returns the statistics of each consumer of a site.

        If the recipe holds nothing out, `train` has all sequences.
        """
        assert isinstance(stream, _Past)
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
    if not paths:
        raise InputError("folders is empty; give those that grail.collect wrote")
    index = _merged_index(paths)
    with complete(output, StateError) as folder:
        for name in itertools.chain(*index["sites"].values()):
            total = Gram.load(paths[0] / name)
            for path in paths[1:]:
                total.merge(Gram.load(path / name))
            total.save(folder / name)
        state.write(folder / _INDEX, _KIND, index, {})
    return Path(output)


def _merged_index(paths: Sequence[Path]) -> dict[str, Any]:
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
    return {**indexes[0], "calibrations": list(calibrations.values())}


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / _INDEX).is_file():
        raise StateError(
            f"{folder} holds no statistics: there is no {folder / _INDEX}; give a folder that "
            "grail stats collect or grail stats merge wrote"
        )
    return state.read(folder / _INDEX, _KIND).content
