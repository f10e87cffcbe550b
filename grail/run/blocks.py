"""The blocks of a network, and passes of the calibration set through them."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from grail.calibrate.stream import Stream
from grail.networks import Architecture, BoundSite
from grail.recipe import Recipe
from grail.runtime.clock import Clock
from grail.runtime.onload import Onloader
from grail.runtime.progress import Progress
from grail.statistics.collector import Collector
from grail.statistics.gradient import regional_gradient
from grail.statistics.site_statistics import SiteStatistics


class Blocks:
    """The blocks of a network, their sites, and the calibration set at the entry of one of them.

    Args:
        architecture: the blocks; nothing of them is narrow yet.
        recipe: which sites, how narrow they become, and which statistics that takes.
        stream: the calibration set at the entry of the first block.
        clock: phases "forward" (blocks, without the statistics) and "gram".
        onload: brings each block to the device where it runs; default: it is there.
        known: returns statistics that were collected before, where the stream has no batch.

    `sites`: of each block. `active`: those of them that a run changes. `first_active`: the first
    block with such a site. `dense_share`: of the batches, on which the dense network runs.
    `widths`: by name of site.
    """

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        stream: Stream,
        clock: Clock,
        onload: Onloader | None = None,
        known: Callable[[Any], list[SiteStatistics]] | None = None,
    ):
        self.architecture, self.recipe = architecture, recipe
        self.stream, self.clock = stream, clock
        self.onload = onload or Onloader(stream.blocks, None)
        self.collector = Collector(recipe, stream, clock, known)
        self.sites = recipe.sites_of(architecture)
        self.widths = recipe.widths(architecture)
        self.active = [recipe.active(sites, self.widths) for sites in self.sites]
        self.dense_share = recipe.dense_share
        self.first_active = next((n for n, sites in enumerate(self.active) if sites), len(self))

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def is_idle(self) -> bool:
        """Whether a run changes nothing."""
        return self.recipe.quantize is None and not any(self.active)

    @property
    def all_sites(self) -> list[BoundSite]:
        """The sites of all blocks, in the order in which they run."""
        return list(itertools.chain(*self.sites))

    @property
    def tries_sites(self) -> bool:
        """Whether sites are tried on batches, because nothing is known of the architecture."""
        return not self.architecture.trusted and len(self.stream) > 0

    def has_next(self, block: int) -> bool:
        """Returns whether a block's output is another block's input."""
        return block + 1 < len(self)

    def learn_orders(self) -> None:
        """Finds the order of the tokens in a network of which nothing is known."""
        if self.tries_sites:
            self.collector.learn_orders(self.all_sites)

    def gradients(self, sites: Iterable[BoundSite]) -> dict[BoundSite, Tensor]:
        """Returns the regional gradient of each site, if the selector needs it.

        The stream is at the entry of the sites' block, and none of the sites is narrow.
        """
        if not self.recipe.needs_gradient:
            return {}
        drops, holds_out = self.recipe.non_finite == "drop", self.recipe.holds_out
        with self.clock("forward"):
            return {site: regional_gradient(self.stream, site, drops, holds_out) for site in sites}

    def progress(self, passes: float, shown: bool, label: str = "block") -> Progress:
        """Returns the bar of so many passes over the calibration set; only process 0 shows it."""
        shown = shown and self.stream.processes.number == 0
        tokens, phase = self.stream.own_tokens, lambda: self.clock.phase
        return Progress(len(self), tokens, passes, phase, shown, label)
