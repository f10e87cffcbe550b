"""Paired statistics: against leaving out each sequence by hand, and against repeated draws."""

import math
import statistics

import numpy as np
import pytest

from grail.errors import InputError
from grail.report.paired import difference, is_worse, share, weighted

DRAWS, SEQUENCES = 2000, 32
# Of 2000 intervals of ±2 standard errors with 31 degrees of freedom 94.6% hold the mean of a normal
# difference, with a standard error of 0.5 points; a ratio's are a little shorter. An error that is
# too small by a sixth, or that ignores the pairing, leaves this range.
COVERED = (0.925, 0.965)


def losses(generator, sequences=SEQUENCES):
    """Losses of the dense, the pruned and the restored network on sequences of varied difficulty.

    The expected share is (0.9 − 0.3) / 0.9.
    """
    text = generator.normal(3.0, 0.6, sequences)
    hard = generator.gamma(4.0, 0.25, sequences)  # mean 1
    pruned = text + 0.9 * hard + generator.normal(0, 0.05, sequences)
    restored = text + 0.3 * hard + generator.normal(0, 0.05, sequences)
    return text.tolist(), pruned.tolist(), restored.tolist()


def share_by_hand(dense, pruned, restored):
    means = [statistics.fmean(column) for column in (dense, pruned, restored)]
    return (means[1] - means[2]) / (means[1] - means[0])


@pytest.mark.parametrize("sequences", [2, 3, 9])
def test_the_share_and_its_error_are_those_of_leaving_out_each_sequence(sequences):
    rows = losses(np.random.default_rng(sequences), sequences)
    found = share(*rows)
    assert found.value == pytest.approx(share_by_hand(*rows))
    without = [
        share_by_hand(*(column[:i] + column[i + 1 :] for column in rows)) for i in range(sequences)
    ]
    variance = (sequences - 1) * statistics.pvariance(without)
    assert found.error == pytest.approx(math.sqrt(variance))


def mean_by_hand(values, counts):
    tokens = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
    return statistics.fmean(tokens)


@pytest.mark.parametrize("counts", [[3, 1], [7, 7, 2, 9], [1000, 1, 1, 5, 64]], ids=len)
def test_a_mean_over_tokens_and_its_error_are_those_of_leaving_out_each_sequence(counts):
    values = np.random.default_rng(len(counts)).gamma(2.0, 0.3, len(counts)).tolist()
    found = weighted(values, counts)
    assert found.value == pytest.approx(mean_by_hand(values, counts))
    without = [
        mean_by_hand(values[:i] + values[i + 1 :], counts[:i] + counts[i + 1 :])
        for i in range(len(counts))
    ]
    variance = (len(counts) - 1) * statistics.pvariance(without)
    assert found.error == pytest.approx(math.sqrt(variance))


def test_of_sequences_of_one_length_the_error_is_that_of_their_mean():
    values = [0.3, 0.5, 0.1, 0.8]
    found = weighted(values, [31] * 4)
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / 2)
    assert weighted([0.5] * 4, [31, 7, 2, 9]).error == pytest.approx(0, abs=1e-12)


def test_a_mean_has_no_error_of_one_sequence_or_beyond_finite_values():
    assert (weighted([0.5], [9]).value, weighted([0.5], [9]).error) == (0.5, None)
    assert weighted([0.5, math.inf], [9, 9]).value == math.inf
    assert weighted([0.5, math.inf], [9, 9]).error is None


def test_long_sequences_count_more_in_comparisons():
    rows, counts = losses(np.random.default_rng(3), 4), [31, 7, 2, 9]
    tokens = [[v for v, n in zip(of, counts, strict=True) for _ in range(n)] for of in rows]
    assert share(*rows, counts).value == pytest.approx(share_by_hand(*tokens))
    assert difference(rows[1], rows[0], counts).value == pytest.approx(
        statistics.fmean(tokens[1]) - statistics.fmean(tokens[0])
    )
    # Worse in a long sequence and better in three short ones.
    others, own = [1.0, 1.0, 1.0, 1.0], [1.5, 0.9, 0.8, 0.9]
    assert difference(own, others).value > 0.02
    assert not is_worse(own, others)
    assert is_worse([1.5, 1.6, 1.0, 1.5], others, counts=[31, 29, 1, 30])
    assert not is_worse([1.5, 1.6, 1.0, 1.5], others, counts=[1, 1, 90, 1])


def test_two_standard_errors_of_a_mean_hold_the_truth_as_often_as_they_should():
    generator, inside = np.random.default_rng(2), 0
    for _ in range(DRAWS):
        counts = generator.integers(200, 1024, SEQUENCES)
        values = generator.normal(0.4, 0.1, SEQUENCES)
        found = weighted(values.tolist(), counts.tolist())
        inside += abs(found.value - 0.4) <= 2 * found.error
    assert COVERED[0] < inside / DRAWS < COVERED[1]


def test_the_difference_is_that_of_paired_sequences():
    found = difference([3.0, 5.0, 4.0], [1.0, 4.0, 1.0])
    assert found.value == pytest.approx(2.0)
    assert found.error == pytest.approx(statistics.stdev([2.0, 1.0, 3.0]) / math.sqrt(3))


def test_two_standard_errors_hold_the_truth_as_often_as_they_should():
    generator = np.random.default_rng(0)
    inside = {"share": 0, "difference": 0}
    for _ in range(DRAWS):
        dense, pruned, restored = losses(generator)
        found, gap = share(dense, pruned, restored), difference(pruned, restored)
        inside["share"] += abs(found.value - 2 / 3) <= 2 * found.error
        inside["difference"] += abs(gap.value - 0.6) <= 2 * gap.error
    for name, count in inside.items():
        assert COVERED[0] < count / DRAWS < COVERED[1], name


def test_equal_models_are_seldom_called_worse():
    generator = np.random.default_rng(1)
    worse = 0
    for _ in range(DRAWS):
        _, pruned, other = losses(generator)
        noise = generator.normal(0, 0.05, (2, SEQUENCES))
        worse += is_worse(
            (np.array(pruned) + noise[0]).tolist(), (np.array(pruned) + noise[1]).tolist()
        )
        assert not is_worse(other, pruned)
        assert is_worse(pruned, other)
    assert 0.015 < worse / DRAWS < 0.04  # 2.7% beyond 2 of 31 degrees of freedom


def test_worse_needs_two_standard_errors():
    others = [0.0, 0.0, 0.0]
    gap = statistics.stdev([1.0, 2.0, 3.0]) / math.sqrt(3)  # 0.577, of mean 2
    assert is_worse([1.0, 2.0, 3.0], others)
    assert is_worse([1.0, 2.0, 3.0], others, errors=2 / gap - 0.01)
    assert not is_worse([1.0, 2.0, 3.0], others, errors=2 / gap + 0.01)
    assert not is_worse(others, others)


def test_one_sequence_has_no_error():
    assert share([1.0], [3.0], [1.5]).error is None
    assert share([1.0], [3.0], [1.5]).value == 0.75
    assert difference([2.0], [1.0]).error is None
    assert not is_worse([2.0], [1.0])


def test_there_is_no_share_where_pruning_lost_nothing():
    assert share([2.0, 2.0], [2.0, 2.0], [1.0, 1.0]) is None
    assert share([2.0, 3.0], [2.0, 2.5], [1.0, 1.0]) is None
    # All of the loss is that of one sequence.
    assert share([2.0, 3.0], [4.0, 3.0], [3.0, 3.0]).error is None


def test_lists_of_other_sequences_are_refused():
    for lists in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(InputError, match="the same sequences"):
            difference(*lists)
    with pytest.raises(InputError, match="got lists of 2, 1"):
        weighted([1.0, 2.0], [3])
    with pytest.raises(InputError, match="got lists of 1, 1, 2, 1"):
        share([1.0], [2.0], [1.0, 2.0])
