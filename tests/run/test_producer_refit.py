"""Producers that are refitted: the errors are the network's, the rows those of the algebra."""

import copy

import pytest
import torch
from torch import nn

import grail
from grail.errors import InputError
from tests.networks.test_families import network  # noqa: F401, a fixture
from tests.reported import (
    assert_errors_are_those_of_the_network,
    assert_errors_of_a_run_are_those_of_the_network,
)
from tests.run.test_reported import randomised

# Gated units, of one fused layer too, GELU and ReLU; norms after the consumer; images.
FAMILIES = ["llama", "phi3", "gemma2", "gpt2", "opt", "bert", "vit"]
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_the_error_of_a_site_narrowed_alone_is_the_networks(family, network):  # noqa: F811
    model, batches = network(family)
    assert_errors_are_those_of_the_network(model, batches[:12], ("mlp",), refit_producers=2)


@every_family
def test_the_errors_of_a_run_are_the_networks(family, network):  # noqa: F811
    model, batches = network(family)
    assert_errors_of_a_run_are_those_of_the_network(
        model, batches[:12], ("mlp",), refit_producers=2
    )


@every_family
def test_errors_fall(family, network):  # noqa: F811
    model, batches = network(family)
    reports = [
        grail.compress(
            copy.deepcopy(model), batches, 0.5, ("mlp",), refit_producers=steps, progress=False
        )
        for steps in (0, 2)
    ]
    without, with_refit = ([row.error for row in report.sites] for report in reports)
    assert sum(with_refit) < 0.97 * sum(without)
