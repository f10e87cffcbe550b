"""`grail export --onnx`: what it writes, prints and refuses."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import grail as library
from grail.commands import export_onnx
from grail.serving.onnx_check import Comparison
from grail.serving.onnx_writing import OnnxFile
from tests.commands.test_cli import grail, refusal
from tests.convnets import images, network

ROOT = Path(__file__).parents[2]
FOUND = Comparison("ONNX Runtime 1.2.3", (1, 2, 5), "logits", 2e-5, 4.0)
MODULE = """
from tests.convnets import network

def make():
    return network("torchvision-basic")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A compressed network, and the module that makes the dense one, in the current folder."""
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("my_networks", None)  # of another test
    (tmp_path / "my_networks.py").write_text(MODULE)
    net = network("torchvision-basic")
    library.compress(net, images(size=32), 0.5, multiple=1, progress=False)
    yield library.save(net, tmp_path / "net")
    sys.modules.pop("my_networks", None)


@pytest.fixture
def exporter(monkeypatch):
    """Takes the place of what writes and compares, which need ONNX; returns what they are given."""
    given = []

    def answering(*comparisons):
        def export(model, output, example, *, factory, verify):
            given.append((model, example, factory, verify))
            shapes = {"x": ("batch", 3, 32, 32)}, {"logits": ("batch", 10)}
            return OnnxFile(Path(output).absolute(), *shapes, 20, 4_000_000, comparisons)

        def check(model, path, *, factory):
            given.append((model, path, factory))
            return comparisons

        monkeypatch.setattr(export_onnx, "export_onnx", export)
        monkeypatch.setattr(export_onnx, "check_onnx", check)
        return given

    return answering


def test_says_what_was_written(folder, exporter):
    given = exporter(FOUND)
    options = ["--network", "my_networks:make", "--input", "3,32,32"]
    result = grail("export", folder, "--onnx", "net.onnx", *options)
    assert result.stdout.splitlines() == [
        "onnx    net.onnx (4.00 MB, float32, opset 20)",
        "form    x [batch, 3, 32, 32] to logits [batch, 10]",
        "check   largest difference 5.0e-06 of the largest value of logits, batches of 1, 2, 5 "
        "(ONNX Runtime 1.2.3)",
    ]
    ((model, example, factory, verify),) = given
    assert (model, example.shape[1:], verify) == (folder, (3, 32, 32), True)
    assert type(factory()).__name__ == "Net"


def test_says_that_a_file_was_not_verified(folder, exporter):
    given = exporter()
    result = grail("export", folder, "--onnx", "net.onnx", "--no-verify")
    assert (
        "check   not verified: no runtime was run; pip install onnxruntime, then" in result.stdout
    )
    assert given == [(folder, None, None, False)]
    result = grail("export", folder, "--check", "net.onnx")
    assert result.stdout.startswith("check   not verified: no runtime was run")
    assert given[1:] == [(folder, Path("net.onnx"), None)]


def test_json_has_the_same_facts(folder, exporter):
    exporter(FOUND)
    facts = json.loads(grail("export", folder, "--onnx", "net.onnx", "--json").stdout)
    assert facts["inputs"] == {"x": ["batch", 3, 32, 32]}
    assert facts["path"] == str(folder.parent / "net.onnx")
    assert facts["comparisons"][0]["share"] == 5e-6
    facts = json.loads(grail("export", folder, "--check", "net.onnx", "--json").stdout)
    assert (facts["check"], facts["comparisons"][0]["output"]) == ("net.onnx", "logits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--onnx", "a.onnx", "--gguf", "a.gguf"],
            "or --onnx FILE to write one, or --check FILE to compare one",
        ),
        (
            ["--onnx", "a.onnx", "--check", "a.onnx"],
            "or --onnx FILE to write one, or --check FILE to compare one",
        ),
        (
            ["--onnx", "a.onnx", "--pad", "32"],
            "--pad is used with --gguf or --imatrix: give that as well, or leave",
        ),
        (
            ["--check", "a.onnx", "--like", "a.gguf"],
            "--like is used with --gguf: give that as well, or leave it out",
        ),
        (
            ["--gguf", "a.gguf", "--network", "a:b"],
            "--network is used with --onnx or --check: give that as well",
        ),
        (["--check", "a.gguf", "--network", "a:b"], "--network is used with ONNX files: leave it"),
        (
            ["--check", "a.onnx", "--input", "3,4"],
            "--input is used with --onnx: give that as well, or leave it out",
        ),
        (
            ["--check", "a.onnx", "--no-verify"],
            "is used with --gguf or --onnx: give that as well, or leave it out",
        ),
        (["--onnx", "a.onnx"], "stores no code: name the function that makes the dense network"),
        (["--onnx", "a.onnx", "--network", "make"], "is given as module:function"),
        (["--onnx", "a.onnx", "--network", "no:f"], "no:f cannot be imported: No module named"),
        (["--onnx", "a.onnx", "--input", "3,a"], "--input is the shape of one sample, such as"),
        (
            ["--onnx", "a.onnx", "--network", "my_networks:make"],
            "Net does not say what it reads: give the shape of an image (--input 3,224,224)",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(folder, options, message):
    before = sorted(folder.parent.iterdir())
    assert message in refusal(grail("export", folder, *options))
    after = [path for path in folder.parent.iterdir() if path.name != "__pycache__"]
    assert sorted(after) == before


@pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnxscript") is None, reason="needs ONNX"
)
def test_the_page_s_commands_run_as_typed(folder, tiny_model):
    model = tiny_model("vit")
    library.compress(model, images(size=16), 0.5, multiple=1, progress=False)
    model.save_pretrained("vit")
    page = (ROOT / "docs" / "serving" / "onnx.md").read_text(encoding="utf-8")
    lines = [line.split() for line in page.splitlines() if line.startswith("    grail ")]
    assert [line[2] for line in lines] == ["vit/", "net/", "net/"]
    for _, *words in lines:
        done = grail(*words)
        assert done.exit_code == 0, done.output
        assert "(ONNX Runtime 1." in done.stdout
    session = __import__("onnxruntime").InferenceSession("net.onnx")
    (found,) = session.run(["output"], {"x": images(size=32)[0].numpy()})
    assert found.shape[0] == 5
