"""The bench of refitted producers, on a tiny network."""

import pytest
import torch

from bench.quality import producers, scores, sweep
from bench.tools.measuring import Table, read_rows
from tests import convnets

NETWORK = convnets.network("torchvision-basic")
NETWORK.fc.weight.data *= 300  # else all probabilities are alike
TEST = torch.cat(convnets.images(count=2, seed=1))


def subject():
    dense = scores.log_probabilities(NETWORK, TEST)
    return sweep.Subject(
        NETWORK,
        lambda samples: convnets.images(count=samples),
        lambda model: {"agreement": scores.accuracy(model, TEST, dense.argmax(-1))},
        5,
        ("conv",),
        each=lambda model: scores.distances(scores.log_probabilities(model, TEST), dense),
    )


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(producers, "SUBJECTS", {"tiny": subject})
    monkeypatch.setattr(producers, "CELLS", {"tiny": (0.5, (1,))})
    return Table(tmp_path / "producers.csv", producers.KEY)


def test_each_row_is_paired_with_the_defaults(table):
    producers.measure("tiny", table)
    rows = {(row["steps"], row["measure"]): row for row in read_rows(table.path)}
    assert list(rows) == [(s, m) for s in ("0", "1") for m in ("kl", "agreement")]
    for name in ("kl", "agreement"):
        before, after = (rows[steps, name] for steps in ("0", "1"))
        gain = float(after["value"]) - float(before["value"])
        assert float(after["gain"]) == pytest.approx(gain, abs=2e-6)
        assert (before["gain"], before["gain_error"]) == ("0.0", "0.0")
        assert after["count"] == str(len(TEST))
    assert abs(float(rows["1", "kl"]["gain"])) > 1e-4
    assert float(rows["1", "kl"]["gain_error"]) > 0
    study = read_rows(table.path.parent / "studies_tiny.csv")
    assert study[-1]["variant"] == "ours, producers refitted, 1 steps"
    assert study[-1]["agreement"] == f"{float(rows['1', 'agreement']['value'])}"


def test_what_is_there_is_not_measured_again(table, monkeypatch):
    producers.measure("tiny", table)
    rows = list(table.rows)
    monkeypatch.setattr(producers, "SUBJECTS", {})
    producers.measure("tiny", Table(table.path, producers.KEY))
    assert read_rows(table.path) == rows
    assert len(list(producers.lines(rows))) == 4


def test_every_cell_is_a_network_of_the_sweep():
    assert producers.CELLS.keys() <= sweep.SUBJECTS.keys()
