"""Hooks of the documentation site: `make docs` runs them by mkdocs.yml.

Pages of docs/ name files beside docs/: sources, tests, CSV files, figures. The site holds every
file that a page names, under repository/: sources as pages of code, others as they are. A path, a
test or a public name in code font becomes a link, to its file or its place in the reference.
CHANGELOG.md is a page of the site. Address and repository of the site are those of [project.urls]
in pyproject.toml.
"""

import functools
import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = "docs"
HELD = "repository"  # the folder of the site with files from beside docs/
SOURCES = {".py": "python", ".j2": "jinja", ".yml": "yaml", ".toml": "toml"}

LINK = re.compile(r"(?<=\]\()([^)\s#]+)((?:#[^)\s]*)?)(?=\))")
NAMED = re.compile(r"`((?:\w[\w.-]*/)+[\w.-]+\.\w+)(?:::\w+)?`")
CODE = re.compile(r"(?<!\">)<code>((?:\w[\w.-]*/)+[\w.-]+\.\w+)(?:::(\w+))?</code>")
PUBLIC = re.compile(r"(?<!\">)<code>(grail[\w.]*)(\([^<]*\))?</code>")
TESTS = re.compile(rf"<td>({CODE.pattern}(?:, {CODE.pattern})*)</td>")


@functools.cache
def public_names() -> dict[str, str]:
    """Returns the page below docs/ of each name that the reference describes."""
    pages = sorted((ROOT / DOCS / "reference").glob("*.md"))
    return {
        name: page.relative_to(ROOT / DOCS).as_posix()
        for page in pages
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }


def inside(path: str) -> Path | None:
    """Returns the file of a path in the repository; None if there is none, or it is a page."""
    file = ROOT / path
    outside = path.startswith(("..", "/", f"{DOCS}/"))
    return file if not outside and file.is_file() else None


def linked(page: str, target: str) -> str | None:
    """Returns the path in the repository of a file beside docs/ that a page links to, or None.

    Args:
        page: its path below docs/.
        target: of the link, relative to the page.
    """
    path = posixpath.normpath(posixpath.join(DOCS, posixpath.dirname(page), target))
    return path if inside(path) else None


def held(path: str) -> str:
    """Returns the path below docs/ at which the site holds a file of the repository."""
    return f"{HELD}/{path}.md" if Path(path).suffix in SOURCES else f"{HELD}/{path}"


def relative(page: str, other: str) -> str:
    """Returns the link from one page to another file, both below docs/."""
    return posixpath.relpath(other, posixpath.dirname(page) or ".")


def named(page: str, text: str) -> Iterator[str]:
    """Yields the files beside docs/ that a page names, in links and in code font."""
    for match in LINK.finditer(text):
        if path := linked(page, match[1]):
            yield path
    yield from (match[1] for match in NAMED.finditer(text) if inside(match[1]))


def of_source(path: str) -> str:
    """Returns the page of a source file."""
    text, language = (ROOT / path).read_text(encoding="utf-8"), SOURCES[Path(path).suffix]
    fence = max(re.findall(r"`{3,}", text), key=len, default="``") + "`"
    head = "---\nhide: [navigation, toc]\nsearch: {exclude: true}\n---\n"
    return f'{head}\n# {path}\n\n{fence}{language} linenums="1"\n{text}\n{fence}\n'


def line_of(path: str, name: str) -> int:
    """Returns the line of a source on which a function is defined; 1 if it is not there."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return next((n for n, line in enumerate(lines, 1) if f"def {name}(" in line), 1)


def changelog() -> str:
    """Returns CHANGELOG.md as a page: its links start from docs/, not from the root."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    def moved(match: re.Match[str]) -> str:
        if "//" in match[1]:
            return match[0]
        path = match[1].removeprefix(f"{DOCS}/")
        return (path if path != match[1] else f"../{path}") + match[2]

    return LINK.sub(moved, text)


def on_config(config: Any) -> Any:
    """Takes description and addresses from pyproject.toml."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = project.get("urls", {})
    config.site_description = project["description"]
    config.site_url = urls.get("Documentation", config.site_url)
    config.repo_url = urls.get("Repository", config.repo_url)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the changelog, and every file beside docs/ that a page names."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "changelog.md", content=changelog()))
    pages = [file for file in files if file.is_documentation_page()]
    for path in sorted(
        {path for page in pages for path in named(page.src_uri, page.content_string)}
    ):
        if Path(path).suffix in SOURCES:
            files.append(File.generated(config, held(path), content=of_source(path)))
        else:
            files.append(File.generated(config, held(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to files beside docs/ to where the site holds them."""
    own = page.file.src_uri
    if own == "index.md":
        page.meta["hide"] = ["navigation"]  # a section of one page

    def moved(match: re.Match[str]) -> str:
        path = linked(own, match[1])
        return match[0] if path is None else relative(own, held(path)) + match[2]

    return markdown if own.startswith(f"{HELD}/") else LINK.sub(moved, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Links paths and public names in code font; in promises, tests become numbered links."""
    own = page.file.src_uri
    if own.startswith(f"{HELD}/"):
        return content

    def address(path: str, name: str | None) -> str | None:
        file = files.get_file_from_path(held(path)) if inside(path) else None
        if file is None:
            return None
        line = f"#__codelineno-0-{line_of(path, name)}" if name else ""
        return html.escape(relative(page.file.url, file.url) + line)

    def numbered(match: re.Match[str]) -> str:
        found = [(*cell.groups(), address(*cell.groups())) for cell in CODE.finditer(match[1])]
        links = (
            f'<a href="{url}" title="{html.escape(name or path)}">{number}</a>'
            for number, (path, name, url) in enumerate(found, 1)
        )
        return match[0] if None in (url for *_, url in found) else f"<td>{' '.join(links)}</td>"

    def one(match: re.Match[str]) -> str:
        url = address(*match.groups())
        return match[0] if url is None else f'<a href="{url}">{match[0]}</a>'

    def described(match: re.Match[str]) -> str:
        there = public_names().get(match[1], own)
        if there == own:
            return match[0]
        url = relative(page.file.url, files.get_file_from_path(there).url)
        return f'<a href="{url}#{match[1]}">{match[0]}</a>'

    content = PUBLIC.sub(described, content)
    return CODE.sub(one, TESTS.sub(numbered, content) if own == "promises.md" else content)
