"""Blocks of the pages: what README.md and docs/ show as code, and how each is run.

A block is fenced, or indented by four spaces. Its language is python, or that of commands (bash,
console, sh); an indented block that is no Python has commands. Data are shown, not run. Directly
above a block a comment can stand:

    <!-- continues -->          it runs with the names and in the folder of the block before it
    <!-- not run: a GPU -->     it is not run, for one of `REASONS`

Every other block runs alone, in a folder with the files that it names (`tests/prepared.py`).
"""

import ast
import itertools
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASONS = ("a GPU", "hours", "the network", "another environment", "a fragment")
COMMANDS = ("bash", "console", "sh", "shell")
SHOWN = ("bibtex", "html", "ini", "jinja", "json", "mermaid", "text", "toml", "yaml")
# What a call writes: its position among the arguments. Keywords are in `_WRITTEN_KEYWORDS`.
_WRITTEN = {
    **dict.fromkeys(("save_pretrained", "copytree"), 0),
    **dict.fromkeys(("compress_checkpoint", "export_gguf", "export_imatrix", "export_onnx"), 1),
    **dict.fromkeys(("generate_calibration", "merge", "save"), 1),
    "export": 2,
}
_WRITTEN_KEYWORDS = ("output", "resume_dir")
_WRITTEN_OPTIONS = (
    *("--csv", "--gguf", "--imatrix", "--onnx", "--output", "--plot", "--resume-dir", "-o"),
)
_FENCE = re.compile(r"( *)(`{3,}|~{3,}) *([\w-]*)")
_CONTAINER = re.compile(r" *(?P<item>[-*+] +|\d+[.)] +)|( *)(!!!|\?\?\?\+?|===) ")


@dataclass(frozen=True)
class Block:
    """A block of a page: where it stands, its language, its text and the comment above it."""

    page: Path
    line: int
    language: str
    text: str
    comment: str = ""

    @property
    def place(self) -> str:
        """File and line, for messages."""
        shown = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{shown}:{self.line}"

    @property
    def reason(self) -> str:
        """Why it is not run, or nothing."""
        return self.comment.removeprefix("not run:").strip() if "not run" in self.comment else ""

    @property
    def continues(self) -> bool:
        return self.comment == "continues"

    @cached_property
    def commands(self) -> list["Command"]:
        """Its commands; of a block with prompts, the lines that have one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        parts = (shlex.split(part, comments=True) for line in lines for part in line.split("&&"))
        return [Command.of(words) for words in parts if words]

    def named(self) -> tuple[set[str], set[str]]:
        """Files and folders that it names: all of them, and those that it writes itself."""
        if self.language == "python":
            return _named_in_python(self.text)
        named, written = set(), set()
        for command in self.commands:
            words = [part for word in command.words for part in _parted(word)]
            named |= {_plain(word) for word in words[1:]}
            written |= {
                _plain(value)
                for option, value in itertools.pairwise(words)
                if option in _WRITTEN_OPTIONS
            }
        return named, written


@dataclass(frozen=True)
class Command:
    """Words of a command, without the variables set before it; `python -m grail` is `grail`."""

    words: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, words: list[str]) -> "Command":
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words and re.fullmatch(r"(.*/)?python3?(\.\d+)?", words[0]):
            words = ["python", *words[1:]]
        if words[:3] == ["python", "-m", "grail"]:
            words = ["grail", *words[3:]]
        return cls(words)

    @property
    def program(self) -> str:
        return self.words[0] if self.words else ""


def blocks(page: Path) -> list[Block]:
    """Every block of a page, in its order."""
    return list(_blocks(page, page.read_text(encoding="utf-8").splitlines()))


def _blocks(page: Path, lines: list[str]) -> Iterator[Block]:
    containers: list[int] = []  # columns at which the text of each open item or box begins
    number, above = 0, ""
    while number < len(lines):
        line = lines[number]
        if not line.strip():
            number += 1
            continue
        indent = len(line) - len(line.lstrip(" "))
        while containers and indent < containers[-1]:
            containers.pop()
        base = containers[-1] if containers else 0
        fence = _FENCE.match(line)
        code = indent >= base + 4 and (number == 0 or not lines[number - 1].strip())
        if fence is not None and not code:
            end = _end_of_fence(lines, number, fence[2])
            text = textwrap.dedent("\n".join(lines[number + 1 : end]))
            yield Block(page, number + 1, fence[3], text, _comment(above))
        elif code:
            end = _end_of_indented(lines, number, base + 4)
            text = textwrap.dedent("\n".join(lines[number:end])).strip("\n")
            yield Block(page, number + 1, _language(text), text, _comment(above))
            end -= 1
        else:
            end = number
            if opened := _CONTAINER.match(line):
                containers.append(opened.end("item") if opened["item"] else indent + 4)
        above = line if end == number else ""
        number = end + 1


def _end_of_fence(lines: list[str], start: int, mark: str) -> int:
    for number in range(start + 1, len(lines)):
        if lines[number].strip() == mark:
            return number
    raise AssertionError(f"line {start + 1}: the fence {mark} is never closed")


def _end_of_indented(lines: list[str], start: int, indent: int) -> int:
    """The line after the last one that is indented so far."""
    end = number = start
    while number < len(lines) and (not lines[number].strip() or lines[number][:indent].isspace()):
        number += 1
        if lines[number - 1].strip():
            end = number
    return end


def _comment(line: str) -> str:
    found = re.fullmatch(r"\s*<!-- *(continues|not run:.*?) *-->", line)
    return found[1] if found else ""


def _language(text: str) -> str:
    try:
        ast.parse(text)
    except SyntaxError:
        return "bash"
    return "python"


def _parted(word: str) -> list[str]:
    """An option and the value after its sign of equality."""
    return word.split("=", 1) if word.startswith("--") else [word]


def _plain(word: str) -> str:
    return word.rstrip("/")


def _named_in_python(text: str) -> tuple[set[str], set[str]]:
    tree = ast.parse(text)
    named = {
        _plain(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    written = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
        given = [key.value for key in call.keywords if key.arg in _WRITTEN_KEYWORDS]
        position = _WRITTEN.get(name, sys.maxsize)
        given += call.args[position : position + 1]
        written |= {
            _plain(value.value)
            for value in given
            if isinstance(value, ast.Constant) and isinstance(value.value, str)
        }
    return named, written


def inline(page: Path) -> list[list[str]]:
    """Commands in the running text: code between backticks that begins with grail or python -m."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        text = text.replace(block.text, "")
    found = re.findall(r"`((?:\S*python -m (?:bench|grail)\b|grail [a-z]+ )[^`]*)`", text)
    return [shlex.split(command) for command in found]
