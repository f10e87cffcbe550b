"""The report page: what it says, and that it needs nothing but itself."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from grail.page import (
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    page,
    save_page,
)
from grail.report import Evaluation, InputReport, Report, SiteReport

pytest.importorskip("matplotlib")


def evaluation(perplexity):
    return Evaluation(perplexity, 4092, 1_000_000, 4_000_000, 512.0)


def rows(**perplexities):
    return {name: evaluation(value) for name, value in perplexities.items()}


def report(blocks=4, kinds=("mlp", "heads"), **changes):
    sites = [
        SiteReport(
            name=f"model.layers.{block}.{kind}",
            kind=kind,
            block=block,
            channels=64,
            kept=32,
            tokens=2048,
            alpha=1e-4,
            drift_correction=0.25,
            damping=1e-3,
            retries=0,
            error=0.2,
            baseline_error=0.4,
        )
        for block in range(blocks)
        for kind in kinds
    ]
    whole = Report(
        settings={"keep": 0.5, "sites": list(kinds), "selector": "wanda", "compensate": True},
        model={"name": "tiny", "parameters": {"before": 1_500_000, "after": 1_000_000}},
        calibration={"source": "text.txt", "tokens": 2048},
        sites=sites,
        inputs=[
            InputReport(
                name=f"model.layers.{block}.self_attn",
                block=block,
                layers=[f"model.layers.{block}.self_attn.{p}_proj" for p in "qkv"],
                tokens=2048,
                alpha=1e-4,
                drift_correction=0.75,
                error=0.12 + 0.01 * block,
                baseline_error=0.23,
            )
            for block in range(1, blocks)
        ],
        seconds={
            "forward": 4.0,
            "gram": 1.0,
            "select": 0.5,
            "solve": 0.3,
            "absorb": 0.2,
            "total": 6.0,
        },
        memory={"predicted_peak": 1_100_000_000, "measured_peak": 1_000_000_000},
        evaluation=rows(dense=18.2, pruned=47.4, restored=25.7),
        notes=["widths were rounded"],
        versions={"torch": "2.13.0"},
    )
    return dataclasses.replace(whole, **changes)


def test_uneven_widths_are_shown_and_even_ones_are_not():
    even = report()
    assert "Who keeps how much" not in page(even)
    sites = [dataclasses.replace(site, kept=8 * (2 + site.block)) for site in even.sites]
    keep = {site.name: site.kept / site.channels for site in sites}
    shown = page(report(sites=sites, settings={**even.settings, "keep": keep}))
    assert "Who keeps how much" in shown
    assert "keep 0.25 to 0.62, by site" in shown
    kinds = {"mlp": [0.5, 0.75], "a": 0.5, "b": 0.25, "c": 0.5, "d": 0.5}
    listed = page(report(sites=sites, settings={**even.settings, "keep": kinds}))
    assert "keep 0.25 to 0.75, by site" in listed
    assert "MLP channels 25% to 62%; attention heads 25% to 62%" in shown


class Document(HTMLParser):
    """Tags, attributes and visible text of an HTML text; fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def values(self, attribute):
        return [value for _, name, value in self.attributes if name == attribute]


@pytest.mark.parametrize(
    ("perplexities", "share"),
    [
        # By hand: ln(47.4/25.7) / ln(47.4/18.2) = 0.6122 / 0.9571.
        ({"dense": 18.2, "pruned": 47.4, "restored": 25.7}, 0.6396),
        ({"dense": 10, "pruned": 1000, "restored": 100}, 0.5),
        ({"dense": 10, "pruned": 20, "restored": 10}, 1.0),
        ({"dense": 10, "pruned": 20, "restored": 20}, 0.0),
        ({"dense": 10, "pruned": 20, "restored": 40}, -1.0),
    ],
    ids=["paper", "half", "all", "none", "worse"],
)
def test_recovered_is_the_share_of_lost_log_perplexity(perplexities, share):
    assert Report({}, {}, {}, evaluation=rows(**perplexities)).recovered == pytest.approx(
        share, abs=1e-4
    )


@pytest.mark.parametrize(
    "perplexities",
    [
        {"dense": 10, "restored": 12},
        {"dense": 10, "pruned": 10, "restored": 10},
        {"dense": 10, "pruned": math.inf, "restored": 12},
        {"dense": 10, "pruned": 20, "restored": math.inf},
        {"dense": 10, "pruned": 20, "restored": math.nan},
        {},
    ],
    ids=["no pruned row", "nothing lost", "all lost", "none back", "not a number", "no rows"],
)
def test_recovered_is_none_where_the_share_has_no_meaning(perplexities):
    assert Report({}, {}, {}, evaluation=rows(**perplexities)).recovered is None


def test_a_report_is_strict_json_and_reads_back_infinite_perplexities():
    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    whole = report(evaluation=rows(dense=10, pruned=20, restored=math.inf))
    text = whole.to_json()
    assert json.loads(text, parse_constant=refuse)["evaluation"]["restored"]["perplexity"] is None
    assert Report.from_json(text) == whole


def test_a_report_from_before_attention_was_corrected_can_be_read():
    whole = report()
    data = json.loads(whole.to_json())
    del data["inputs"]
    assert Report.from_json(json.dumps(data)) == dataclasses.replace(whole, inputs=[])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(999), "999 B"),
        (format_bytes(269_060_552), "269 MB"),
        (format_bytes(1_610_000_000), "1.61 GB"),
        (format_count(134_515_008), "135 M"),
        (format_count(12), "12"),
        (format_number(18.234), "18.2"),
        (format_number(1234.5), "1,234"),
        (format_number(4.18e52), "4.18e+52"),
        (format_number(0.0), "0"),
        (format_number(math.inf), "∞"),
        (format_seconds(0.4), "0.40 s"),
        (format_seconds(33.21), "33.2 s"),
        (format_seconds(185.2), "3 min 05 s"),
    ],
)
def test_quantities_are_written_with_three_digits_and_a_unit(text, expected):
    assert text == expected


def test_page_shows_the_share_and_every_row_of_the_table():
    text = Document(page(report())).text
    assert "64% of the lost log-perplexity came back" in text
    for cell in ("18.2", "47.4", "25.7", "1.00 M", "4.00 MB", "512", "widths were rounded"):
        assert cell in text
    assert (
        "own work took 50% of the time of the forward passes" in text
    )  # (1 + 0.5 + 0.3 + 0.2) / 4
    assert "off by +10.0%" in text
    # Blocks 1 to 3: 0.13, 0.14 and 0.15.
    assert "corrected in 3 blocks: what it reads differs from the dense network's by 23.0%" in text
    assert "by 14.0% once projections see through it" in text
    assert "model.layers.3.self_attn" in text


def test_page_needs_no_script_and_no_other_file():
    html = page(report())
    document = Document(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(document.tags)
    assert not [name for _, name, _ in document.attributes if name.startswith("on")]
    links = document.values("href") + document.values("xlink:href") + document.values("src")
    assert all(link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html


def test_references_inside_the_drawings_are_unique_and_resolve():
    html = page(report())
    document = Document(html)
    identifiers = document.values("id")
    assert len(identifiers) == len(set(identifiers))
    used = {value[1:] for value in document.values("xlink:href")}
    used |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert used
    assert used <= set(identifiers)


def test_every_text_is_escaped():
    hostile = "<evil onload='x'>&amp;$x_1$"
    site = SiteReport(hostile, hostile, 0, 4, 2, 8, None, 0.0, 0.0, 0, 0.1, 0.2)
    document = Document(
        page(
            report(
                settings={
                    hostile: hostile,
                    "sites": [hostile],
                    "selector": hostile,
                    "keep": hostile,
                },
                model={"name": hostile},
                calibration={"source": hostile},
                sites=[site],
                notes=[hostile],
                versions={hostile: hostile},
            )
        )
    )
    assert "evil" not in document.tags
    # Title, headline, facts, note, panel title, site row, and both columns of the detail tables.
    assert document.text.count(hostile) >= 10


def test_every_colour_follows_the_light_or_dark_scheme():
    html = page(report())
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.findall(r"#[0-9a-fA-F]{6}", drawings)
    style = html[: html.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for variable in set(re.findall(r"var\(--(\w+)\)", html)):
        assert f"--{variable}:" in light
        assert f"--{variable}:" in dark


def test_every_drawing_has_a_title_and_a_description():
    drawings = re.findall(r"<svg.*?</svg>", page(report()), re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        assert 'role="img"' in drawing
        assert re.search(r"<title>[^<]+</title><desc>[^<]+</desc>", drawing)


def test_error_plot_has_a_pair_of_points_a_site_and_few_labels_at_many_sites():
    blocks = 120
    html = page(report(blocks=blocks, evaluation={}, seconds={}, memory={}))
    (drawing,) = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    # Two panels, two points a block and panel, and the two points of the legend.
    assert drawing.count("<use ") >= 2 * 2 * blocks + 2
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
    assert sum(label.isdigit() for label in labels) <= 2 * 14


def bar_length(html, colour):
    """Width in points of the bar that is filled with a colour of the page."""
    bar = rf'd="M ([\d.]+) \S+\s+L ([\d.]+) [^"]*"[^>]*fill: var\(--{colour}\)'
    left, right = map(float, re.search(bar, html).groups())
    return right - left


@pytest.mark.parametrize(
    ("perplexities", "lengths"),
    [((10, 40, 20), (10, 40, 20)), ((10, 10_000, 100), (1, 4, 2))],
    ids=["linear", "logarithmic where one dwarfs the others"],
)
def test_perplexity_bars_are_in_proportion(perplexities, lengths):
    evaluated = rows(**dict(zip(("dense", "pruned", "restored"), perplexities, strict=True)))
    html = page(report(evaluation=evaluated, sites=[], seconds={}, memory={}))
    assert ("logarithmic" in html) == (perplexities != lengths)
    dense, pruned, restored = (
        bar_length(html, colour) for colour in ("dense", "pruned", "restored")
    )
    # SVG coordinates have six digits.
    assert dense / pruned == pytest.approx(lengths[0] / lengths[1], rel=1e-4)
    assert restored / pruned == pytest.approx(lengths[2] / lengths[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({"evaluation": {}}, "0.50× the output error of plain pruning", "tokens/s"),
        ({"evaluation": rows(dense=10, restored=12)}, "0.50× the output error", "came back"),
        (
            {"evaluation": rows(dense=10, pruned=9, restored=9)},
            "no share of the lost log-perplexity",
            "came back",
        ),
        (
            {"evaluation": rows(dense=10, pruned=20, restored=40)},
            "worse than plain pruning",
            "nan",
        ),
        (
            {"evaluation": rows(dense=10, pruned=30, restored=math.inf)},
            "no share of the lost log-perplexity",
            "on a logarithmic scale",
        ),
        (
            {"evaluation": rows(dense=10, pruned=1e300, restored=math.inf)},
            "on a logarithmic scale",
            "came back",
        ),
        ({"evaluation": rows(dense=math.inf)}, "∞", "came back"),
        ({"seconds": {}, "memory": {}}, "came back", "Time and memory"),
        ({"notes": []}, "came back", "Notes"),
    ],
    ids=[
        *("not evaluated", "no pruned row", "nothing lost", "worse"),
        *("one infinite", "one huge, one infinite", "all infinite", "no costs", "no notes"),
    ],
)
def test_page_says_what_is_known_and_leaves_out_what_is_not(changes, present, absent):
    text = Document(page(report(**changes))).text
    assert present in text
    assert absent not in text


def test_plain_pruning_without_errors_is_called_plain_pruning():
    sites = [dataclasses.replace(s, error=None, baseline_error=None) for s in report().sites]
    settings = {"compensate": False}
    text = Document(
        page(report(sites=sites, settings=settings, evaluation=rows(dense=10, pruned=20)))
    ).text
    assert "This run is plain pruning" in text
    assert "67% of the parameters are left" in text
    assert "Relative output error" not in text


def test_sites_that_were_not_touched_count_in_no_error():
    whole = report(blocks=4, kinds=("mlp",), evaluation={})
    for site in whole.sites[:3]:
        site.kept, site.error, site.baseline_error = site.channels, 0.0, 0.0
    text = Document(page(whole)).text
    assert "0.50× the output error" in text
    assert "1 of 1 sites improved" in text


def test_an_empty_report_still_makes_a_page():
    assert "0 sites compressed" in Document(page(Report({}, {}, {}))).text


def test_pages_are_reproducible_and_saved_as_utf8(tmp_path):
    save_page(report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(report())


def test_drawing_leaves_matplotlib_as_found():
    code = (
        "import sys, grail.page; assert 'matplotlib' not in sys.modules\n"
        "from grail.report import Evaluation, Report\n"
        "import matplotlib; before = matplotlib.rcParams.copy()\n"
        "rows = {'dense': Evaluation(10.0, 8, 8, 8, 1.0)}\n"
        "grail.page.page(Report({}, {}, {}, evaluation=rows))\n"
        "assert matplotlib.rcParams.copy() == before and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
