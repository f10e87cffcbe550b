"""An ONNX file holds its network, for batches of any size, in the runtimes that load it."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import grail
from grail.errors import ExportError, InputError, ModelError
from grail.serving import onnx_check, onnx_writing
from grail.serving.onnx_writing import check_onnx, export_onnx
from tests.convnets import images, network

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

SETTINGS = {"keep": 0.5, "multiple": 1, "progress": False}
NETWORKS = ("torchvision-basic", "timm-inverted-se", "torchvision-resnext")
RUNTIMES = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}"))
    for name in ("onnxruntime", "openvino")
]
ANY = find_spec("onnxruntime") is not None or find_spec("openvino") is not None


@pytest.fixture
def only(monkeypatch):
    """Lets files be compared in one runtime; None is none."""

    def chosen(name):
        known = onnx_check.runtimes()
        found = {name: known[name]} if name else {}
        monkeypatch.setattr(onnx_check, "runtimes", lambda: found)

    return chosen


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Compressed networks and their files, each written once; tests only read them."""
    folder, found = tmp_path_factory.mktemp("onnx"), {}

    def made(name):
        if name not in found:
            net = network(name)
            grail.compress(net, images(), **SETTINGS)
            path = folder / f"{name}.onnx"
            found[name] = net, export_onnx(net, path, images()[0], verify=False)
        return found[name]

    return made


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5)).eval()


def reference(path, *arrays):
    """What ONNX's own definition of the operators computes; it shares no code with a runtime."""
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(str(path))
    return session.run(None, dict(zip(session.input_names, arrays, strict=True)))


def assert_close(found, own):
    own = own.detach().numpy()
    assert np.abs(found - own).max() <= 1e-5 * np.abs(own).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_computes_what_the_network_does(written, name):
    net, file = written(name)
    assert file.comparisons == ()
    assert file.bytes == file.path.stat().st_size
    assert file.inputs == {"x": ("batch", 3, 12, 12)}
    assert file.outputs == {"output": ("batch", *net(images()[0]).shape[1:])}
    for rows in (1, 2, 7):
        (x,) = images(1, rows, seed=1)
        assert_close(reference(file.path, x.numpy())[0], net(x))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_runtime_agrees(written, only, runtime, name):
    only(runtime)
    net, file = written(name)
    (found,) = check_onnx(net, file.path)
    assert found.share <= 1e-5
    assert (found.batches, found.output) == ((1, 2, 5), "output")


def test_a_vision_transformer_of_a_folder_agrees(tiny_model, tmp_path):
    model = tiny_model("vit")
    grail.compress(model, images(size=16), sites=("mlp", "heads"), **SETTINGS)
    grail.save(model, tmp_path / "net")
    file = export_onnx(tmp_path / "net", tmp_path / "a.onnx", factory=lambda: tiny_model("vit"))
    assert file.inputs == {"pixel_values": ("batch", 3, 16, 16)}
    assert list(file.outputs) == ["last_hidden_state", "pooler_output"]
    assert len(file.comparisons) == len(onnx_check.runtimes())
    (x,) = images(1, 3, size=16)
    with torch.no_grad():
        own = model(x)
    for found, expected in zip(reference(file.path, x.numpy()), own.values(), strict=True):
        assert_close(found, expected)


def test_a_file_holds_no_path_of_this_machine_and_is_the_same_again(written, tmp_path):
    net, file = written(NETWORKS[0])
    content = file.path.read_bytes()
    again = export_onnx(net, tmp_path / "again.onnx", images()[0], verify=False)
    assert again.path.read_bytes() == content
    for word in (b".py", b"stack_trace", str(Path(__file__).parents[2]).encode()):
        assert word not in content


class Several(nn.Module):
    """Several arguments, of which one has no samples, and a tree of outputs."""

    def forward(self, first, second=None, flag=True, *, mask=None):
        total = first + second if flag else first
        return {"total": total, "parts": [mask.float(), first.argmax(1)], "nothing": None}


def test_several_inputs_and_outputs_have_names(tmp_path):
    example = {
        "first": torch.randn(3, 4),
        "second": torch.randn(4),
        "mask": torch.tensor([1, 0, 1]),
    }
    file = export_onnx(Several(), tmp_path / "a.onnx", example)
    assert file.inputs == {"first": ("batch", 4), "second": (4,), "mask": ("batch",)}
    assert file.outputs == {
        "total": ("batch", 4),
        "parts_0": ("batch",),
        "parts_1": ("batch",),
    }
    found = reference(file.path, *(tensor.numpy() for tensor in example.values()))
    assert_close(found[0], example["first"] + example["second"])
    assert len(file.comparisons) == len(onnx_check.runtimes())
    assert check_onnx(Several(), file.path, example) == file.comparisons
    with pytest.raises(
        InputError, match=r"reads mask \['batch'\], which are no images of one size"
    ):
        check_onnx(Several(), file.path)


def test_a_network_keeps_its_mode_and_its_gradients(tmp_path, only):
    only(None)
    net = tiny().train()
    export_onnx(net, tmp_path / "a.onnx", images()[0])
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_an_operation_without_onnx_is_refused_in_torch_s_words(tmp_path):
    class Decomposed(nn.Module):
        def forward(self, x):
            return torch.linalg.svd(x)[1]

    with pytest.raises(ModelError, match=r"no ONNX form of this network: No ONNX fun.*_svd"):
        export_onnx(Decomposed(), tmp_path / "a.onnx", torch.randn(2, 3, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_differs_is_not_kept(tmp_path, only, runtime, monkeypatch):
    only(runtime)
    write = onnx_writing._write

    def damaging(program, inputs, outputs, path):
        write(program, inputs, outputs, path)
        model = onnx.load(path)
        weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0] *= 1.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(onnx_writing, "_write", damaging)
    with pytest.raises(ExportError, match=r"a.onnx is not the network: largest difference .*e-0"):
        export_onnx(tiny(), tmp_path / "a.onnx", images()[0])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_checker_refuses_is_not_kept(tmp_path, monkeypatch):
    write = onnx_writing._write

    def damaging(program, inputs, outputs, path):
        write(program, inputs, outputs, path)
        model = onnx.load(path)
        model.graph.node[0].op_type = "Nonsense"
        onnx.save(model, path)

    monkeypatch.setattr(onnx_writing, "_write", damaging)
    with pytest.raises(
        ExportError, match=r"the checker of ONNX refuses the file: .*Nonsense.*report it"
    ):
        export_onnx(tiny(), tmp_path / "a.onnx", images()[0])
    assert list(tmp_path.iterdir()) == []


def by_hand(path, operator="Relu", shape=("batch", 3), domain=""):
    """Writes a file of one operation, as any exporter may."""
    from onnx import TensorProto, helper

    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("in", "out")
    )
    node = helper.make_node(operator, ["in"], ["out"], domain=domain)
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    graph = helper.make_graph([node], "by hand", [given], [made])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_of_another_exporter_is_compared(tmp_path, only, runtime):
    only(runtime)
    (found,) = check_onnx(nn.ReLU(), by_hand(tmp_path / "a.onnx"))
    assert (found.difference, found.batches) == (0.0, (1, 2, 5))
    (found,) = check_onnx(nn.ReLU(), by_hand(tmp_path / "fixed.onnx", shape=(4, 3)))
    assert (found.difference, found.batches) == (0.0, (4,))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_fails_is_quoted(tmp_path, only, runtime):
    only(runtime)
    path = by_hand(tmp_path / "a.onnx", "Unheard", domain="some.where")
    with pytest.raises(
        ExportError, match=r"does not run a.onnx \(exit code 1\); it says: .*Unheard"
    ):
        check_onnx(nn.ReLU(), path)


@pytest.mark.skipif(not ANY, reason="needs onnxruntime or openvino")
def test_a_runtime_that_dies_leaves_no_file(tmp_path, monkeypatch):
    dying = [sys.executable, "-c", "import os; os.abort()"]
    monkeypatch.setattr(onnx_check, "program", lambda *_: dying)
    with pytest.raises(
        ExportError, match=r"does not run a.onnx \(exit code -6\); it says: nothing"
    ):
        export_onnx(tiny(), tmp_path / "a.onnx", images()[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not ANY, reason="needs onnxruntime or openvino")
def test_a_file_of_another_network_is_refused(tmp_path):
    path = by_hand(tmp_path / "a.onnx")
    with pytest.raises(InputError, match="of another network: Conv2d does not run on a batch of 1"):
        check_onnx(nn.Conv2d(3, 4, 3), path)
    with pytest.raises(
        InputError, match=r"gives \[1, 3\] for output, and the network \[1, 4\]: it"
    ):
        check_onnx(nn.Linear(3, 4), path)
    with pytest.raises(ExportError, match="is not the network"):
        check_onnx(nn.Tanh(), path)

    class Twice(nn.Module):
        def forward(self, x):
            return x, x + 1

    with pytest.raises(InputError, match="has 1 outputs, and the network 2"):
        check_onnx(Twice(), path)
    with pytest.raises(InputError, match="has 1 inputs, and the batch 2 tensors"):
        check_onnx(Signed(), path, (torch.ones(2, 3), torch.ones(2, 3)))


class Signed(nn.Module):
    def forward(self, x, y):
        return x * y.sign()


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.onnx: no such ONNX file"):
        check_onnx(nn.ReLU(), tmp_path / "nowhere.onnx")
    (tmp_path / "text.onnx").write_text("text, no protobuf")
    with pytest.raises(InputError, match=r"text.onnx is not an ONNX file"):
        check_onnx(nn.ReLU(), tmp_path / "text.onnx")
    by_hand(tmp_path / "any.onnx", shape=("batch", "length"))
    with pytest.raises(InputError, match=r"reads in \['batch', 'length'\], which are no images of"):
        check_onnx(nn.ReLU(), tmp_path / "any.onnx")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_values_that_are_not_finite_count(tmp_path, only, runtime, value):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.cat([x, torch.full_like(x, value)])

    only(runtime)
    if value != value:
        with pytest.raises(ExportError, match="is not the network: largest difference inf"):
            export_onnx(Odd(), tmp_path / "a.onnx", torch.randn(2, 3))
    else:
        assert export_onnx(Odd(), tmp_path / "a.onnx", torch.randn(2, 3)).comparisons[0].is_close


def test_too_little_disk_is_said(tmp_path, monkeypatch, only):
    only(None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 10}))
    with pytest.raises(ExportError, match="needs 32 MiB and the disk has 0 MiB free"):
        export_onnx(tiny(), tmp_path / "a.onnx", images()[0])
