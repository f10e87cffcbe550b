"""The site of docs/: it builds strictly, every link leads somewhere, and no page is left out."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import grail
import grail_kernels
from bench.tools import site

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}
NAMES_NO_FILE = ("canonical", "prev", "next")  # of links in the head of a page


class Links(HTMLParser):
    """The identifiers, the links and the loaded files of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADS.get(tag, "")) and given.get("rel") not in NAMES_NO_FILE:
            self.loads.append(given[LOADS[tag]])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Every page of the site by its path, and the folder."""
    for package in ("mkdocs", "material", "mkdocstrings", "tomllib"):
        pytest.importorskip(package, reason="the packages of the documentation are not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    return folder, pages


def test_every_link_leads_to_a_file_and_an_anchor_that_exist(built):
    folder, pages = built
    assert len(pages) > len(PAGES)
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links start from the root of a server
        for link in page.links + page.loads:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            file = (path.parent / unquote(target)).resolve() if target else path
            found = file.is_file() and (
                not anchor or file not in pages or unquote(anchor) in pages[file].names
            )
            if not found:
                broken.append(f"{path.relative_to(folder)}: {link}")
    assert broken == []


def test_pages_load_nothing_from_a_network(built):
    _, pages = built
    loaded = {link for page in pages.values() for link in page.loads}
    assert loaded
    assert not [link for link in loaded if "//" in link]


def test_lists_and_tables_are_not_left_as_text(built):
    folder, _ = built
    for page in PAGES:
        text = (folder / page).with_suffix(".html").read_text(encoding="utf-8")
        text = re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)
        assert not re.findall(r"^<p>(?:- |\|).*|\n(?:- |\| ?---).*", text), page


def test_the_navigation_holds_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    held = re.findall(r": ([\w/]+\.md)$", text, flags=re.MULTILINE)
    assert sorted(held) == sorted(PAGES | {"changelog.md"})


def test_the_reference_has_every_public_name_once():
    text = {name: (DOCS / "reference" / f"{name}.md").read_text() for name in ("python", "kernels")}
    python = re.findall(r"^::: grail\.(\w+)$", text["python"], flags=re.MULTILINE)
    assert sorted(python) == sorted({*grail.__all__, "errors"} - {"GrailError"})
    kernels = re.findall(r"^::: grail_kernels\.(\w+)$", text["kernels"], flags=re.MULTILINE)
    assert sorted(kernels) == sorted(grail_kernels.__all__)


def test_the_changelog_is_linked_from_where_it_stands():
    page = site.changelog()
    targets = [match[1] for match in site.LINK.finditer(page)]
    assert "architecture.md" in targets
    assert not [target for target in targets if target.startswith("docs/")]
    assert all((DOCS / target).is_file() for target in targets if "//" not in target)


def test_a_file_beside_the_pages_is_found_from_each_of_them():
    assert site.linked("kernels.md", "../bench/gram.py") == "bench/gram.py"
    assert site.linked("serving/gguf.md", "../../bench/gram.py") == "bench/gram.py"
    for target in (
        "glossary.md",
        "../docs/glossary.md",
        "../../passwd",
        "../nothing.py",
        "../bench",
    ):
        assert site.linked("kernels.md", target) is None
    assert site.held("bench/gram.py") == "repository/bench/gram.py.md"
    assert site.held("bench/results/house.csv") == "repository/bench/results/house.csv"
    assert site.relative("serving/gguf.md", site.held("a/b.csv")) == "../repository/a/b.csv"


def test_a_page_names_files_by_links_and_in_code():
    text = "[a](../bench/gram.py#x) `tests/test_site.py::test_a`, `docs/glossary.md` `no/such.py`"
    assert list(site.named("kernels.md", text)) == ["bench/gram.py", "tests/test_site.py"]


def test_a_test_is_linked_at_its_line():
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = site.line_of("tests/test_site.py", "test_a_test_is_linked_at_its_line")
    assert lines[line - 1].startswith("def test_a_test_is_linked")
    assert site.line_of("tests/test_site.py", "nothing") == 1


def test_a_source_with_fences_is_one_block():
    text = (site.ROOT / "tests" / "test_blocks.py").read_text(encoding="utf-8")
    assert "```" in text
    page = site.of_source("tests/test_blocks.py")
    assert page.count("\n````") == 2
    assert text in page


def test_public_names_are_those_of_the_reference():
    names = site.public_names()
    assert names["grail.compress"] == "reference/python.md"
    assert names["grail_kernels.gram_"] == "reference/kernels.md"
    assert names["grail.select.greedy"] == "reference/selectors.md"


def test_every_path_in_code_font_is_a_file():
    ours = ("bench", "grail", "grail_kernels", "tests")
    for page in PAGES:
        named = site.NAMED.findall((DOCS / page).read_text(encoding="utf-8"))
        missing = [path for path in named if path.startswith(ours) and not site.inside(path)]
        assert missing == [], page
