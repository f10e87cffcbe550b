"""What a run says of itself while it is under way."""

import io
import re
import time

import pytest
from tqdm import tqdm

import grail
from grail.runtime import progress
from grail.runtime.progress import Progress, ticking


@pytest.fixture
def bars(monkeypatch):
    """The bars that a run made."""
    made = []

    def make(*args, **kwargs):
        made.append(tqdm(*args, **kwargs, file=io.StringIO(), mininterval=0, miniters=0))
        return made[-1]

    make.write = tqdm.write
    monkeypatch.setattr(progress, "tqdm", make)
    return made


RUNS = {
    "defaults": {},
    "heads and mlp": {"sites": ("heads", "mlp")},
    "attention corrected": {"correct_attention": True},
    "producers refitted": {"refit_producers": 2},
    "no drift": {"drift_correction": 0},
    "open loop": {"closed_loop": False},
    "some blocks": {"keep": {"mlp": [1.0, 0.5, 1.0]}},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_bar_ends_at_its_last_block_and_last_pass(settings, bars, tiny_llama, tiny_batches):
    model = tiny_llama(num_hidden_layers=3)
    grail.compress(model, tiny_batches(), **{"keep": 0.5, **settings})
    (bar,) = bars
    assert bar.n == bar.total > 0
    shown = bar.fp.getvalue()
    assert re.search(r"block 1/3", shown)
    last = re.findall(r"block (\d)/3(?:, pass (\d+)/(\d+))?", shown)[-1]
    assert last[0] == "3"
    assert last[1] == last[2]


def test_a_bar_names_what_the_run_is_doing(bars, tiny_llama, tiny_batches):
    grail.compress(tiny_llama(), tiny_batches(), 0.5)
    assert re.search(r"block 1/2, pass 1/3, forward", bars[0].fp.getvalue())


def test_a_resumed_run_says_where(bars, tiny_llama, tiny_batches, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    settings = {"keep": 0.5, "resume_dir": tmp_path / "state"}
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        grail.compress(model, tiny_batches(), **settings)
    grail.compress(tiny_llama(), tiny_batches(), **settings)
    first, second = (bar.fp.getvalue() for bar in bars)
    assert "resumed" not in first
    assert "resumed after block 1 of 2" in second
    assert bars[1].n == bars[1].total


def test_the_passes_of_collecting_and_measuring_are_shown(bars, tiny_llama, tiny_batches, tmp_path):
    grail.collect(tiny_llama(), tiny_batches(), output=tmp_path / "a")
    grail.sensitivity(tiny_llama(), tiny_batches())
    collecting, measuring = bars
    assert collecting.n == collecting.total > 0
    assert measuring.n == measuring.total > 0
    assert "sensitivity of block 2/2" in measuring.fp.getvalue()


def test_a_bar_moves_while_nothing_is_counted():
    bar = tqdm(total=10, file=io.StringIO())
    before = len(bar.fp.getvalue())
    described = []
    with ticking(bar, lambda: described.append(1), seconds=0.01):
        time.sleep(0.2)
    assert len(described) >= 3
    assert len(bar.fp.getvalue()) > before
    seen = len(described)
    time.sleep(0.05)
    assert len(described) == seen


def test_without_progress_there_is_neither_bar_nor_thread(capsys, tiny_llama, tiny_batches):
    with Progress(2, 10, 3, lambda: "forward", shown=False) as bar:
        bar.start(0, 3)
        bar.advance(10)
        bar.say("words")
    grail.compress(tiny_llama(), tiny_batches(), 0.5, progress=False)
    assert capsys.readouterr() == ("", "")
