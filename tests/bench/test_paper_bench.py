"""The bench of the paper's experiments, on tiny networks and random images."""

import csv
import dataclasses

import pytest
import torch

pytest.importorskip("transformers")

import grail
from bench.quality import captions, networks, scores, sweep
from bench.quality import paper as bench
from bench.report import paper
from bench.tools import assets
from grail import select


@pytest.fixture
def images(monkeypatch):
    """Random images in the place of Fashion-MNIST, few enough for seconds."""
    pixels = torch.randint(256, (160, 28, 28), dtype=torch.uint8)
    labels = torch.randint(10, (160,), dtype=torch.uint8)
    data = assets.FashionMnist(pixels, labels, pixels[:32], labels[:32])
    monkeypatch.setattr(assets, "fashion_mnist", lambda _: data)
    return data


def resnet():
    torch.manual_seed(0)
    subject = sweep.fashion(networks.ResNet(1, width=8).eval(), ("conv",), lambda x: x)
    return dataclasses.replace(subject, samples=64)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_alone_a_selector_is_as_its_authors_describe_it():
    assert bench.settings_of("flap", "own")["fit_bias"]
    assert bench.settings_of("slimgpt", "own")["toward"] == "baseline"
    assert bench.settings_of("wanda", "own") == {"compensate": False}
    assert bench.settings_of("slimgpt", "grail") == bench.settings_of("wanda", "grail")
    for rows in bench.PARTS.values():
        for selector, keep, _, settings, _ in rows():
            assert selector in select.names()
            grail.Recipe(**settings, selector=selector, keep=keep)


def test_the_resnets_stream_is_narrow_as_well_and_a_second_run_measures_nothing(
    images, tmp_path, monkeypatch
):
    monkeypatch.setitem(bench.SUBJECTS, "resnet18", resnet)
    monkeypatch.setattr(bench, "RESNET_KEEPS", (0.5,))
    monkeypatch.setattr(bench, "finetune", lambda network: None)
    variants = {"own": {"compensate": False}, "own, REPAIR": {"compensate": False, "repair": True}}
    monkeypatch.setattr(bench, "references", lambda: variants)
    bench.resnet18(bench.Choice(tmp_path))
    file = tmp_path / "paper_resnet18.csv"
    rows = rows_of(file)
    assert [r["variant"] for r in rows[1:]] == [row[2] for row in bench.resnet_rows()]
    sizes = {(r["variant"].endswith(bench.STREAM), int(r["parameters"])) for r in rows[1:]}
    (inside, inside_size), (stream, stream_size) = sorted(sizes)
    assert not inside
    assert stream
    # All channels of every layer are halved, not only those inside the blocks.
    assert stream_size < 0.3 * int(rows[0]["parameters"]) < inside_size
    written = file.read_bytes()
    monkeypatch.setattr(grail, "compress", lambda *_, **__: pytest.fail("measured again"))
    bench.resnet18(bench.Choice(tmp_path))
    assert file.read_bytes() == written
    text = paper.Page(paper.Results(tmp_path)).resnet()
    assert "inside blocks | 50% |" in text
    assert text.splitlines()[-1].startswith("| with the stream | 50% |")


def test_finetuning_changes_a_narrow_network_and_ends_in_evaluation_mode(images):
    network = networks.ResNet(1, width=8).eval()
    before = [network.conv1.weight.clone(), network.fc.weight.clone()]
    bench.finetune(network, epochs=1)
    assert not network.training
    assert not torch.equal(before[0], network.conv1.weight)
    assert not torch.equal(before[1], network.fc.weight)


def test_a_row_is_scored_after_what_is_done_to_its_network(images, tmp_path):
    subject = dataclasses.replace(resnet(), score=lambda network: {"accuracy": float(network.mark)})
    subject.network.mark = 0
    measured = sweep.Bench(subject, tmp_path / "some.csv")
    settings = {"compensate": False}
    measured.measure(
        "random", 0.5, "own", settings, after=lambda network: setattr(network, "mark", 1)
    )
    assert [row["accuracy"] for row in rows_of(tmp_path / "some.csv")] == ["0.0", "1.0"]


def test_a_narrow_tower_is_scored_among_the_captions(images, tmp_path, monkeypatch):
    torch.manual_seed(0)
    clip = captions.new_clip().eval()
    monkeypatch.setattr(captions, "clip_fashion", lambda: clip)
    classifier = captions.Captioned(clip).eval()
    inputs, labels = networks.fashion_inputs(images.test_images), images.test_labels
    subject = bench.vision_tower()
    dense = scores.accuracy(classifier, inputs, labels)
    assert subject.score(clip.vision_model)["accuracy"] == dense
    monkeypatch.setattr(bench, "CLIP_KEEPS", (0.5,))
    monkeypatch.setattr(bench, "CLIP_SELECTORS", ("wanda",))
    bench.clip(bench.Choice(tmp_path))
    rows = rows_of(tmp_path / "paper_clip.csv")
    assert [row["variant"] for row in rows] == ["dense", *bench.SHOWN]
    lost = {int(rows[0]["parameters"]) - int(row["parameters"]) for row in rows[1:]}
    config = clip.config.vision_config
    half, hidden = config.intermediate_size // 2, config.hidden_size
    assert lost == {config.num_hidden_layers * half * (2 * hidden + 1)}


def test_costs_are_beyond_what_was_in_use(images, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "COSTED", {"resnet18": resnet})
    monkeypatch.setattr(bench, "ROUNDS", 1)
    bench.cost(bench.Choice(tmp_path))
    rows = rows_of(tmp_path / "paper_cost.csv")
    assert [row["design"] for row in rows] == [*bench.DESIGNS]
    weights = sum(p.nbytes for p in resnet().network.parameters())
    for row in rows:
        assert float(row["calibrate_s"]) > 0 < float(row["compensate_s"])
        assert int(row["weights_bytes"]) == weights
        assert int(row["inputs_bytes"]) == 64 * 28 * 28 * 4
        # The process itself, hundreds of MB, is not counted.
        assert 0 < float(row["added_predicted_peak_bytes"]) < 1e8
    assert "resnet18 here: paper recipe" in paper.Page(paper.Results(tmp_path)).costs()


@pytest.mark.parametrize("part", ["alphas", "samples"])
def test_a_language_model_is_read_on_two_kinds_of_text(
    part, tiny_llama, tiny_batches, tmp_path, monkeypatch
):
    asked = []

    class Tiny:
        model = tiny_llama()

        def batches(self, text, half, tokens):
            asked.append((text, half, tokens))
            return tiny_batches()

    monkeypatch.setattr(bench, "LanguageModel", Tiny)
    monkeypatch.setattr(bench, "SWEPT", ("wanda",))
    monkeypatch.setattr(bench, "ALPHAS", (1e-5,))
    monkeypatch.setattr(bench, "SIZES", (4,))
    bench.measure_language(part, bench.Choice(tmp_path))
    text, file = {"alphas": ("technical", "smollm2"), "samples": ("documentation", "samples")}[part]
    rows = rows_of(tmp_path / f"paper_{file}.csv")
    assert [(r["selector"], r["variant"]) for r in rows[1:]] == [
        (selector, variant) for selector, _, variant, _, _ in bench.PARTS[part]()
    ]
    assert all(float(row[f"perplexity_{read}"]) > 1 for row in rows for read in (text, "brown"))
    counts = [bench.SEQUENCES, 4] if part == "samples" else [bench.SEQUENCES]
    heldout = [(name, "heldout", bench.HELDOUT) for name in (text, "brown")]
    assert asked == [*heldout, *((text, "calibration", count * 1024) for count in counts)]
    measured = paper.Page(paper.Results(tmp_path))
    shown = measured.sequences() if part == "samples" else measured.strengths()
    value = f"| {float(rows[-1][f'perplexity_{text}']):.1f} |"
    assert value in shown
