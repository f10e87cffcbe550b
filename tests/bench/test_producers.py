"""The bench of refitted producers, on a tiny network."""

import pytest
import torch

from bench.quality import producers, scores, sweep
from bench.tools.measuring import Table, read_rows
from tests import convnets

NETWORK = convnets.network("torchvision-basic")
TEST = torch.cat(convnets.images(count=2, seed=1))


@torch.no_grad()
def distances(model):
    gaps = (model(TEST) - NETWORK(TEST)).norm(dim=1).double()
    return {"gap": 1000 * gaps, "near": (gaps < 1).double()}


def subject():
    dense = scores.log_probabilities(NETWORK, TEST)
    return sweep.Subject(
        NETWORK,
        lambda samples: convnets.images(count=samples),
        lambda model: {"agreement": scores.accuracy(model, TEST, dense.argmax(-1))},
        5,
        ("conv",),
        each=distances,
    )


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(producers, "SUBJECTS", {"tiny": subject})
    monkeypatch.setattr(producers, "CELLS", {"tiny": (0.5, (1,))})
    return Table(tmp_path / "producers.csv", producers.KEY)


def test_each_row_is_paired_with_the_defaults(table):
    producers.measure("tiny", table)
    rows = {(row["steps"], row["measure"]): row for row in read_rows(table.path)}
    assert list(rows) == [(s, m) for s in ("0", "1") for m in ("gap", "near")]
    for name in ("gap", "near"):
        before, after = (rows[steps, name] for steps in ("0", "1"))
        gain = float(after["value"]) - float(before["value"])
        assert float(after["gain"]) == pytest.approx(gain, abs=2e-6)
        assert (before["gain"], before["gain_error"]) == ("0.0", "0.0")
        assert after["count"] == str(len(TEST))
    assert float(rows["1", "gap"]["gain"]) != 0
    assert float(rows["1", "gap"]["gain_error"]) > 0
    study = read_rows(table.path.parent / "studies_tiny.csv")
    assert study[-1]["variant"] == "ours, producers refitted, 1 steps"
    assert float(study[-1]["agreement"]) == 1


def test_what_is_there_is_not_measured_again(table, monkeypatch):
    producers.measure("tiny", table)
    rows = list(table.rows)
    monkeypatch.setattr(producers, "SUBJECTS", {})
    producers.measure("tiny", Table(table.path, producers.KEY))
    assert read_rows(table.path) == rows
    assert len(list(producers.lines(rows))) == 4


def test_every_cell_is_a_network_of_the_sweep():
    assert producers.CELLS.keys() <= sweep.SUBJECTS.keys()
