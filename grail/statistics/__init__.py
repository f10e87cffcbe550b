"""Statistics that a run collects at its sites: Grams, drift, regional gradients, batch norms."""

from grail.statistics.collector import Collector
from grail.statistics.site_statistics import SiteStatistics

__all__ = ["Collector", "SiteStatistics"]
