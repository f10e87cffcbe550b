"""The benchmarks' networks: their layouts, their arithmetic, and what their weights can do."""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.quality import networks, scores, train
from bench.tools import assets
from grail.errors import InputError

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".assets"
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def fashion():
    try:
        return assets.fashion_mnist(CACHE)
    except InputError as error:
        pytest.skip(str(error))


def test_resnet18_has_torchvisions_names():
    names = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in NORM)}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            prefix = f"layer{stage}.{block}"
            for index in (1, 2):
                names |= {f"{prefix}.conv{index}.weight"}
                names |= {f"{prefix}.bn{index}.{part}" for part in NORM}
        if stage > 1:
            names |= {f"layer{stage}.0.downsample.0.weight"}
            names |= {f"layer{stage}.0.downsample.1.{part}" for part in NORM}
    assert set(networks.new_resnet18().state_dict()) == names


def test_efficientnet_lite0_has_timms_names():
    names = {"conv_stem.weight", "conv_head.weight", "classifier.weight", "classifier.bias"}
    names |= {f"{norm}.{part}" for norm in ("bn1", "bn2") for part in NORM}
    for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1)):
        for block in range(blocks):
            prefix = f"blocks.{stage}.{block}"
            norms = ("bn1", "bn2", "bn3") if stage else ("bn1", "bn2")
            convolutions = ("conv_pw", "conv_dw", "conv_pwl") if stage else ("conv_dw", "conv_pw")
            names |= {f"{prefix}.{convolution}.weight" for convolution in convolutions}
            names |= {f"{prefix}.{norm}.{part}" for norm in norms for part in NORM}
    assert set(networks.EfficientNetLite0().state_dict()) == names


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [8, 9])
def test_a_strided_convolution_is_padded_as_tensorflow_pads(kernel, size):
    convolution = (
        networks.SameConv2d(1, 1, kernel, stride=2, bias=False).double().requires_grad_(False)
    )
    x = torch.randn(1, 1, size, size, dtype=torch.float64)
    # TensorFlow's "same": ceil(size / 2) outputs, and of the padding they need, the smaller half
    # goes first.
    outputs = (size + 1) // 2
    total = (outputs - 1) * 2 + kernel - size
    padded = torch.zeros(size + total, size + total, dtype=torch.float64)
    padded[total // 2 :, total // 2 :][:size, :size] = x[0, 0]
    expected = torch.tensor(
        [
            [
                (padded[2 * row :, 2 * column :][:kernel, :kernel] * convolution.weight[0, 0]).sum()
                for column in range(outputs)
            ]
            for row in range(outputs)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(convolution(x)[0, 0], expected, rtol=0, atol=1e-13)


def test_efficientnet_lite0_recognises_animals():
    try:
        network = networks.efficientnet_lite0()
        assets.photographs(CACHE)
    except InputError as error:
        pytest.skip(str(error))
    photos = assets.read_photographs(CACHE / "gcompris-qt-data" / "explore_world_animals.rcc")
    inputs = torch.stack([assets.crop(photo, 0) for photo in photos])
    found = set(scores.predictions(network, inputs).tolist())
    # ImageNet's indices of what the file shows: wallaby, crocodile, porcupine (for a hedgehog),
    # macaw, koala, ring-tailed lemur, Komodo dragon, polar bear, bison and panda. A thousand
    # classes leave nothing to chance.
    assert found >= {104, 49, 334, 88, 105, 383, 48, 296, 347, 388}


def test_minilm_gives_its_published_similarities():
    try:
        encoder = networks.minilm()
    except InputError as error:
        pytest.skip(str(error))
    sentences = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    embeddings = scores.embed(encoder, networks.sentence_batches(sentences, size=2))
    # From the quickstart of Sentence Transformers, which gives four digits.
    published = torch.tensor([[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]])
    torch.testing.assert_close(embeddings @ embeddings.T, published, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", train.NETWORKS)
def test_the_committed_weights_are_as_good_as_their_log_says(fashion, name):
    _, network = train.NETWORKS[name]
    with (ROOT / "bench" / "results" / f"train_{name}.csv").open() as file:
        logged = float(list(csv.DictReader(file))[-1]["test_accuracy"])
    inputs = networks.fashion_inputs(fashion.test_images[:2000])
    accuracy = scores.accuracy(network().eval(), inputs, fashion.test_labels[:2000])
    # 2000 of 10 000: three standard deviations of the sample's share of errors.
    spread = 3 * (logged * (1 - logged) / 2000) ** 0.5
    assert accuracy == pytest.approx(logged, abs=spread)


def test_an_upcycled_llama_is_the_same_function(tiny_model, tiny_batches):
    llama, (tokens,) = tiny_model("llama"), tiny_batches(count=1, length=24)
    state = torch.get_rng_state()
    mixture = networks.upcycled(llama, experts=3, chosen=2)
    assert torch.equal(torch.get_rng_state(), state)
    routes = []
    mixture.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda _, args: routes.append(args[1])
    )
    with torch.no_grad():
        # The router's weights of a token add up to 1 within rounding.
        torch.testing.assert_close(mixture(tokens).logits, llama(tokens).logits, rtol=0, atol=1e-4)
    assert routes[0].shape == (tokens.numel(), 2)
    assert len(routes[0].unique()) > 1


def test_the_vit_is_saved_and_loaded_exactly(tmp_path):
    pytest.importorskip("transformers")
    network = networks.vit_fashion()
    network.save_pretrained(tmp_path)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(type(network).from_pretrained(tmp_path)(x).logits, network(x).logits)


def test_augmented_images_are_shifted_by_up_to_two_pixels_and_mirrored():
    images = torch.randint(256, (40, 28, 28), dtype=torch.uint8)
    seen = set()
    for image, changed in zip(
        images, train.augmented(images, torch.Generator().manual_seed(0), shift=2), strict=True
    ):
        padded = F.pad(image, (2, 2, 2, 2))
        [match] = [
            (mirrored, down, right)
            for mirrored in (False, True)
            for down in range(5)
            for right in range(5)
            if torch.equal(
                padded[down : down + 28, right : right + 28],
                changed.flip(1) if mirrored else changed,
            )
        ]
        seen.add(match)
    # Of the 50 ways, 40 draws see 50 (1 − 0.98⁴⁰) = 28 on average.
    assert len(seen) > 20


def test_muon_is_torchs_but_for_its_bf16():
    generator = torch.Generator().manual_seed(0)
    for shape in [(24, 24), (24, 96), (96, 24)]:
        first = torch.randn(shape, generator=generator)
        ours, theirs = torch.nn.Parameter(first.clone()), torch.nn.Parameter(first.clone())
        optimisers = [
            kind([parameter], lr=0.02, weight_decay=0.05)
            for kind, parameter in ((train.Muon, ours), (torch.optim.Muon, theirs))
        ]
        for _ in range(5):
            ours.grad = torch.randn(shape, generator=generator)
            theirs.grad = ours.grad.clone()
            for optimiser in optimisers:
                optimiser.step()
        moved = (theirs - first).norm()
        assert (ours - theirs).norm() < 0.02 * moved
        assert moved > 0.2


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (256, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (256,), generator=generator, dtype=torch.uint8)
    data = assets.FashionMnist(images, labels, images, labels)
    monkeypatch.setattr(assets, "fashion_mnist", lambda _: data)
    # Not narrower: without AVX-512 oneDNN's backward of two channels, channels last, crashes.
    new = (lambda: networks.ResNet(1, width=8), networks.resnet18_fashion)
    monkeypatch.setitem(train.NETWORKS, "resnet18", new)

    def weights(folder):
        train.train("resnet18", 2, 0, folder, folder, folder / "log.csv")
        return (folder / "resnet18_fashion.safetensors").read_bytes()

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    expected = weights(whole)
    real = train.epoch_batches

    def interrupted(images, labels, seed, epoch, shift):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(images, labels, seed, epoch, shift)

    monkeypatch.setattr(train, "epoch_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights(stopped)
    monkeypatch.setattr(train, "epoch_batches", real)
    assert weights(stopped) == expected
    assert len((stopped / "log.csv").read_text().splitlines()) == 3
