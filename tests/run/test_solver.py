"""Decisions on sites: what they ask of the device."""

import pytest

import grail
from grail.algebra._fit import fit_each
from grail.run.solver import SiteSolver
from tests.reads import Reads

# The checks and counts of all Grams, the channels of all sites, two rounds of the search for the
# ridge strength, and the result of the fit.
MOST_READS = 5


@pytest.mark.parametrize("settings", [{}, {"alpha": 1e-3, "drift_correction": 0.0}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_group_of_sites_is_decided_with_few_reads(
    family, settings, tiny_model, tiny_batches, monkeypatch
):
    counts, decide = {}, SiteSolver.decide

    def counted(solver, sites, *rest):
        if solver._solve is not fit_each:  # a rehearsal, for the memory of a run
            return decide(solver, sites, *rest)
        with Reads() as reads:
            decisions = decide(solver, sites, *rest)
        counts[sites[0].name] = reads.count, len(sites)
        return decisions

    monkeypatch.setattr(SiteSolver, "decide", counted)
    model, batches = tiny_model(family), tiny_batches(count=6, rows=4, length=64)
    # Scores, whose search a CPU does not run by other means than a GPU.
    grail.compress(model, batches, keep=0.5, selector="wanda", progress=False, **settings)
    assert len(counts) > 1
    for name, (reads, sites) in counts.items():
        assert reads <= MOST_READS, (name, sites)
