import pytest
import torch

import grail
from grail.errors import InputError


def dense_map(reduction: grail.Reduction) -> torch.Tensor:
    """R [K, H] in fp64, from its definition."""
    matrix = torch.zeros(reduction.kept, reduction.channels, dtype=torch.float64)
    if isinstance(reduction, grail.Selection):
        matrix[torch.arange(reduction.kept), reduction.index] = 1
    else:
        for channel, label in enumerate(reduction.labels.tolist()):
            matrix[label, channel] = 1 / int((reduction.labels == label).sum())
    return matrix


REDUCTIONS = [
    pytest.param(grail.Selection([4, 0, 5], 7), id="selection"),
    pytest.param(grail.Folding([0, 2, 1, 0, 2, 2, 1]), id="folding"),
]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_narrow_restrict_and_normal_are_products_with_r(reduction):
    r = dense_map(reduction)
    weight = torch.randn(7, 5, dtype=torch.float64)
    columns = torch.randn(2, 3, 7, dtype=torch.float64)
    gram = torch.randn(7, 7, dtype=torch.float64)
    torch.testing.assert_close(reduction.narrow(weight), r @ weight)
    torch.testing.assert_close(reduction.narrow(weight[:, 0]), r @ weight[:, 0])
    torch.testing.assert_close(reduction.restrict(columns), columns @ r.T)
    torch.testing.assert_close(reduction.normal(gram), r @ gram @ r.T)
    assert reduction.normal(gram.float()).dtype == torch.float64
    narrow = torch.randn(2, 4, reduction.kept, dtype=torch.float64)
    torch.testing.assert_close(reduction.lift(narrow), narrow @ r)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_absorb_is_exact_where_members_of_a_cluster_agree(reduction):
    # If x is what R x says (dropped channels zero, clustered channels equal), plain reduction loses
    # nothing.
    r = dense_map(reduction)
    reduced = torch.randn(reduction.kept, 20, dtype=torch.float64)
    x = (r != 0).to(r).T @ reduced
    consumer = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(reduction.absorb(consumer) @ (r @ x), consumer @ x)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_plain_reduction_leaves_out_is_the_rest_of_the_consumer(reduction):
    consumer = torch.randn(4, 7, dtype=torch.float64)
    baseline = reduction.absorb(consumer)
    rest, (lost, left_out) = torch.zeros_like(consumer), reduction.left_out(consumer, baseline)
    rest[:, lost] = left_out
    torch.testing.assert_close(rest, consumer - baseline @ dense_map(reduction))


def test_a_selection_loses_its_dropped_channels_only():
    lost, _ = grail.Selection([4, 0, 5], 7).left_out(torch.ones(2, 7), torch.ones(2, 3))
    assert lost.tolist() == [1, 2, 3, 6]


def test_folding_averages_in_fp32_and_rounds_once():
    weight = torch.randn(64, 3).bfloat16()
    folded = grail.Folding([0] * 64).narrow(weight)
    assert torch.equal(folded, weight.float().mean(0, keepdim=True).bfloat16())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: grail.Selection([], 4), "empty"),
        (lambda: grail.Selection([0, 4], 4), r"\[0, 4\)"),
        (lambda: grail.Selection([-1], 4), r"\[0, 4\)"),
        (lambda: grail.Selection([1, 1], 4), "at most once"),
        (lambda: grail.Selection(torch.tensor([0.5]), 4), "integers"),
        (lambda: grail.Selection(torch.tensor([True, False]), 3), "an entry for each of 3"),
        (lambda: grail.Selection(torch.tensor([False, False]), 2), "empty"),
        (lambda: grail.Folding(torch.tensor([True, False])), "integers"),
        (lambda: grail.Selection([0], 4.0), "channels must be an integer; got float"),
        (lambda: grail.Selection(None, 4), "got None"),
        (lambda: grail.Selection(torch.zeros(2, 2, dtype=torch.int64), 4), "vector"),
        (lambda: grail.Folding([]), "non-empty"),
        (lambda: grail.Folding([0, 2]), "cluster 1 of 3"),
        (lambda: grail.Folding([-1, 0]), "from 0"),
    ],
)
def test_impossible_reductions_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_a_tensor_of_other_channels_is_refused():
    with pytest.raises(InputError, match="7 channels met a tensor of 6"):
        grail.Selection([0], 7).narrow(torch.randn(6, 2))


@pytest.mark.parametrize(
    "reduction",
    [grail.Selection([4, 1, 2], 5), grail.Folding([0, 1, 0, 2, 1])],
    ids=["selection", "folding"],
)
def test_a_repeated_reduction_is_its_kronecker_product_with_the_identity(reduction):
    r = reduction.narrow(torch.eye(5, dtype=torch.float64))
    repeated = reduction.repeat(3).narrow(torch.eye(15, dtype=torch.float64))
    assert torch.equal(repeated, torch.kron(r, torch.eye(3, dtype=torch.float64)))
