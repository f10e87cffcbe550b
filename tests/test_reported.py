"""Reported errors are those of the real network, over every family and kind of site."""

import pytest

from .reported import (
    assert_errors_are_those_of_the_network,
    assert_errors_of_a_run_are_those_of_the_network,
)
from .test_families import CASES, network  # noqa: F401, a fixture

every_case = pytest.mark.parametrize(("family", "kind"), CASES, ids=[f"{f} {k}" for f, k in CASES])


@every_case
def test_the_error_of_a_site_narrowed_alone_is_the_networks(family, kind, network):  # noqa: F811
    model, batches = network(family)
    assert_errors_are_those_of_the_network(model, batches[:12], (kind,))


@pytest.mark.parametrize(
    ("family", "kind"),
    [case for case in CASES if "experts" not in case[1]],
    ids=[f"{f} {k}" for f, k in CASES if "experts" not in k],
)
def test_the_errors_of_a_run_are_the_networks(family, kind, network):  # noqa: F811
    model, batches = network(family)
    assert_errors_of_a_run_are_those_of_the_network(model, batches[:12], (kind,))
