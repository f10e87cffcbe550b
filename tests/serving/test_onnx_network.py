"""Networks for ONNX files: loaded from folders, named by a function, traced. Needs no ONNX."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

import grail
from grail.errors import ExportError, InputError, ModelError
from grail.serving import onnx_network, onnx_writing
from grail.serving.onnx_check import Comparison, computed, named_tensors
from grail.serving.onnx_network import example_of, load_network, read_factory, read_shape
from grail.serving.onnx_tracing import call_of, traced
from grail.serving.onnx_writing import check_onnx, export_onnx
from tests.convnets import images, network

SETTINGS = {"keep": 0.5, "multiple": 1, "progress": False}
MODULE = """
import torch
from tests.convnets import network

def make():
    return network("torchvision-basic")

def wide(channels, *, kernel=3):
    return torch.nn.Conv2d(3, channels, kernel)

def broken():
    raise RuntimeError("no\\n such  weights.")

def other():
    return "text"

value = 5
"""


@pytest.fixture
def small():
    """A convolutional network at half its channels."""
    net = network("torchvision-basic")
    grail.compress(net, images(), **SETTINGS)
    return net


@pytest.fixture
def vit(tiny_model, tmp_path):
    """A folder of transformers with a vision transformer at half its channels."""
    model = tiny_model("vit")
    grail.compress(model, images(size=16), **SETTINGS)
    model.save_pretrained(tmp_path / "vit")
    return model, tmp_path / "vit"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a module."""
    sys.modules.pop("my_networks", None)  # of another test
    (tmp_path / "my_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_networks", None)


def test_a_saved_network_is_loaded_by_its_function(small, tmp_path):
    folder, batch = grail.save(small, tmp_path / "net"), images()[0]
    found = load_network(folder, lambda: network("torchvision-basic", seed=3))
    assert not found.training
    assert torch.equal(found(batch), small(batch))


def test_a_network_of_16_bit_is_loaded_in_32(small, tmp_path):
    folder = grail.save(small.half(), tmp_path / "net")
    found = load_network(folder, lambda: network("torchvision-basic"))
    assert {tensor.dtype for tensor in found.parameters()} == {torch.float32}
    assert torch.equal(found.state_dict()["fc.weight"], small.state_dict()["fc.weight"].float())


def test_a_folder_of_transformers_needs_no_function(vit):
    model, folder = vit
    batch = images(size=16)[0]
    found = load_network(folder, None)
    assert type(found) is type(model)
    with torch.no_grad():
        assert torch.equal(found(batch)[0], model(batch)[0])
    with pytest.raises(InputError, match=r"names its own class of transformers: leave out --net"):
        load_network(folder, nn.Identity)


def test_a_network_without_its_function_is_refused(small, tmp_path):
    folder = grail.save(small, tmp_path / "net")
    with pytest.raises(InputError, match=r"stores no code: name the function .*--network torchvi"):
        load_network(folder, None)
    with pytest.raises(ExportError, match="the factory makes a Conv2d of other layers"):
        load_network(folder, lambda: nn.Conv2d(3, 8, 3))


@pytest.mark.parametrize("uneven", [False, True])
def test_a_language_model_is_refused_with_the_program_for_it(
    tiny_llama, tiny_batches, tmp_path, uneven
):
    model = tiny_llama()
    keep = [0.9, 0.4] if uneven else 0.5
    grail.compress(model, tiny_batches(), {"mlp": keep}, multiple=1, progress=False)
    folder = grail.export(model, None, tmp_path / "llm", uneven=uneven)
    with pytest.raises(ModelError, match=r"llm is a language model .*onnxruntime_genai.models.bui"):
        export_onnx(folder, tmp_path / "a.onnx")
    with pytest.raises(ModelError, match=r"model is a language model \(LlamaForCausalLM\)"):
        export_onnx(model, tmp_path / "a.onnx", tiny_batches()[0])
    assert not (tmp_path / "a.onnx").exists()


def edited(folder, **changes):
    """Changes config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_hold_no_network_are_refused(vit, tmp_path):
    _, folder = vit
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_network(tmp_path / "nowhere", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has neither grail.json nor config.json"):
        load_network(tmp_path / "empty", None)
    edited(folder, architectures=["NoClassOfTheirs"])
    with pytest.raises(ModelError, match=r"names NoClassOfTheirs in config.json, which is not a"):
        load_network(folder, None)
    edited(folder, architectures=None)
    with pytest.raises(ModelError, match=r"names no class in config.json"):
        load_network(folder, None)
    edited(folder, architectures=["ViTModel"], intermediate_size=80)
    with pytest.raises(ModelError, match="transformers cannot read"):
        load_network(folder, None)
    edited(folder, architectures=["ViTForImageClassification"], intermediate_size=40)
    with pytest.raises(ModelError, match="lacks weights of ViTForImageClassification, such as cla"):
        load_network(folder, None)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("my_networks:make", (5, 10)),
        ("my_networks:make()", (5, 10)),
        ("my_networks:wide(4)", (5, 4, 10, 10)),
        ("my_networks:wide(channels=2, kernel=(1, 1))", (5, 2, 12, 12)),
        ("torch.nn:modules.Conv2d(3, 7, 3)", (5, 7, 10, 10)),
    ],
)
def test_a_function_is_named_as_text(here, text, shape):
    before = list(sys.path)
    made = read_factory(text)()
    assert made(images()[0]).shape == shape
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my_networks", "is given as module:function"),
        ("", "is given as module:function"),
        (":make", "is given as module:function"),
        ("my_networks:make(", "is given as module:function"),
        ("my_networks:wide(channels=open('secret'))", "is given as module:function"),
        ("my_networks:wide(**{'a': 1})", "is given as module:function"),
        ("my_networks:make().half", "is given as module:function"),
        ("my networks:make", "is given as module:function"),
        ("no_such_module:make", "cannot be imported: No module named 'no_such_module'; name"),
        ("my_networks:absent", "cannot be imported: module 'my_networks' has no attribute 'absent"),
        ("my_networks:value", "my_networks:value is a int, not a function"),
    ],
)
def test_what_names_no_function_is_refused(here, text, message):
    with pytest.raises(InputError, match=message):
        read_factory(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my_networks:broken", "makes no network: no such weights"),
        ("my_networks:wide", "makes no network: wide.. missing 1 required positional argument"),
        ("my_networks:other", r"makes a str, not a torch.nn.Module"),
    ],
)
def test_what_makes_no_network_is_refused(here, text, message):
    with pytest.raises(InputError, match=message):
        read_factory(text)()


def test_shapes_are_read():
    assert read_shape("3,224,192") == read_shape("3x224x192") == (3, 224, 192)
    assert read_shape("48") == (48,)
    for text in ("", "3,,4", "0,4", "-1,4", "3;4", "a"):
        with pytest.raises(InputError, match="--input is the shape of one sample, such as 3,224"):
            read_shape(text)


def test_an_example_is_of_the_size_that_a_network_names(tiny_model):
    assert example_of(tiny_model("vit"))[0].shape == (3, 16, 16)
    timm = network("torchvision-basic")
    timm.pretrained_cfg = {"input_size": (3, 12, 14)}
    assert example_of(timm)[0].shape == (3, 12, 14)
    vit = tiny_model("vit")
    vit.config.image_size = [16, 32]
    assert example_of(vit)[0].shape == (3, 16, 32)
    for unknown in (network("torchvision-basic"), tiny_model("bert"), nn.Identity()):
        with pytest.raises(InputError, match=r"does not say what it reads: give the shape"):
            example_of(unknown)


class Signature(nn.Module):
    def forward(self, first, second=None, *, scale=1.0, mask=None):
        return first * scale


def test_batches_of_other_sizes_are_made_of_an_example():
    first, mask, fixed = torch.randn(3, 4), torch.tensor([1, 0, 1]), torch.ones(2, 2)
    example = {"first": first, "mask": mask, "second": fixed, "scale": 2.0}
    one, seven = (call_of(Signature(), example, samples) for samples in (1, 7))
    assert list(one.inputs) == ["first", "second", "mask"]
    assert torch.equal(one.inputs["first"], first[:1])
    found = seven.inputs["first"]
    assert torch.equal(found[:3], first)
    assert not torch.equal(found[3:6], first)  # or a network that mixes samples up would not show
    assert (found[3:6] - first).abs().max() < 1
    assert seven.inputs["mask"].tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert torch.equal(seven.inputs["second"], fixed)
    assert seven.kwargs["scale"] == 2.0
    assert list(seven.dynamic) == ["first", "second", "scale", "mask"]
    assert (seven.dynamic["second"], seven.dynamic["scale"]) == (None, None)
    with pytest.raises(InputError, match="example has no samples"):
        call_of(Signature(), torch.ones(0, 4), 2)


def test_leaves_are_named_by_their_keys():
    value = {"a": 1, "b": [2, None, {"c": 3}], "d": None}
    assert named_tensors(value) == {"a": 1, "b_0": 2, "b_2_c": 3}
    assert named_tensors((4, OrderedDict(e=5)), alone="output") == {"output_0": 4, "output_1_e": 5}
    assert named_tensors(6, alone="output") == {"output": 6}


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x - 1


class Counted(nn.Module):
    def forward(self, x):
        return x.sum() * int(x.shape[0])


class Counting(nn.Module):
    def forward(self, x):
        return {"found": x, "count": len(x)}


def test_a_branch_on_values_is_refused_in_torch_s_words(capfd, tmp_path):
    call = call_of(Branching(), torch.ones(2, 3), 5)
    with pytest.raises(ModelError) as caught:
        traced(Branching(), call)
    message = str(caught.value)
    assert "torch cannot trace Branching for batches of any size: Could not guard on" in message
    assert "(test_onnx_network.py, line" in message
    assert "if x.sum() > 0:" in message
    assert len(message) < 500
    assert capfd.readouterr() == ("", "")  # torch's pages of graphs and advice


def test_a_number_of_samples_in_the_code_is_refused():
    with pytest.raises(ModelError, match="marked batch as dynamic but your code specialized it"):
        traced(Counted(), call_of(Counted(), torch.ones(2, 3), 5))
    net = nn.Unflatten(0, (5, 1))
    call = call_of(net, torch.ones(2, 3), 1)
    with pytest.raises(ModelError, match=r"Unflatten does not run on a batch of 1: .*sizes"):
        computed(net, call)


def test_an_output_that_is_no_tensor_is_refused():
    with pytest.raises(ModelError, match="Counting returns count, a int, and ONNX has tensors al"):
        computed(Counting(), call_of(Counting(), torch.ones(2, 3), 1))


def test_arguments_that_do_not_fit_are_refused(tmp_path, monkeypatch, small):
    target, batch = tmp_path / "a.onnx", images()[0]
    with pytest.raises(ModelError, match=r"written in float32, and .* is torch.float16; give copy"):
        export_onnx(network("torchvision-basic").half(), target, batch)
    with pytest.raises(InputError, match="factory is for a folder"):
        export_onnx(small, target, batch, factory=nn.Identity)
    with pytest.raises(InputError, match=r"factory must be a function .*; got str"):
        export_onnx(small, target, batch, factory="torchvision.models:resnet18")
    with pytest.raises(InputError, match=r"factory must be a function .*; got int"):
        check_onnx(small, target, batch, factory=5)
    with pytest.raises(InputError, match=r"model must be a torch.nn.Module, or a folder; got int"):
        export_onnx(5, target)
    monkeypatch.setattr(onnx_writing, "_MOST", 1000)
    with pytest.raises(ModelError, match=r"holds at most 0.0 GiB of weights, and Net has"):
        export_onnx(small, target, batch)
    target.write_text("mine")
    with pytest.raises(InputError, match=r"a.onnx exists already; name a new file"):
        export_onnx(small, target, batch)
    assert target.read_text() == "mine"


def test_packages_that_are_missing_are_named(small, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_writing, "find_spec", lambda name: None)
    message = r"writing ONNX needs onnx and onnxscript: pip install 'grail-kernels\[onnx\]'"
    with pytest.raises(ModelError, match=message):
        export_onnx(small, tmp_path / "a.onnx", images()[0])
    with pytest.raises(ModelError, match=message):
        check_onnx(small, tmp_path / "a.onnx", images()[0])
    assert list(tmp_path.iterdir()) == []


def test_how_close_is_close(tmp_path):
    def comparison(difference, largest=2.0):
        return Comparison("a runtime 1.2", (1, 2, 5), "logits", difference, largest)

    assert comparison(1e-4).is_close
    assert not comparison(3e-4).is_close
    assert not comparison(float("inf")).is_close
    assert comparison(0.0, 0.0).is_close
    assert "5.0e-05 of the largest value of logits, batches of 1, 2, 5 (a run" in str(
        comparison(1e-4)
    )
    with pytest.raises(ExportError, match=r"a.onnx is not the network: largest difference 5.0e-01"):
        comparison(1.0).require_close(tmp_path / "a.onnx")


def test_transformers_that_is_missing_is_named(vit, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="needs transformers: pip install"):
        onnx_network.load_network(vit[1], None)
