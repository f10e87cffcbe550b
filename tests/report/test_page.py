"""The report page: what it says, and that it needs nothing but itself."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from grail.report.formatting import format_bytes, format_count, format_number, format_seconds
from grail.report.page import page
from grail.report.report import Evaluation, InputReport, Report, SiteReport
from grail.report.summary import headline, keep_in_words, size_sentence, verdict

pytest.importorskip("matplotlib")


def rows(selector="magnitude", **perplexities):
    """Evaluated models by role; pruned and compensated ones of one selector."""
    made = {
        "dense": {},
        "pruned": {"selector": selector},
        "compensated": {"selector": selector, "compensation": "weights"},
        "restored": {"selector": selector, "compensation": "weights"},
    }
    return {
        role: Evaluation(value, 4092, 1_000_000, 4_000_000, **made[role])
        for role, value in perplexities.items()
    }


def greedy(**perplexities):
    """As `rows`, but the model of the report has another selector than the others."""
    found = rows("wanda", **perplexities)
    found["restored"].selector = "greedy"
    return found


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
    assert "Width per block" not in page(even)
    sites = [dataclasses.replace(site, kept=8 * (2 + site.block)) for site in even.sites]
    keep = {site.name: site.kept / site.channels for site in sites}
    shown = page(report(sites=sites, settings={**even.settings, "keep": keep}))
    assert "Width per block" in shown
    assert "MLP channels 25% to 62%; attention heads 25% to 62%" in shown


# Blocks of 16, 24, 32 and 40 of 64 channels: 112 of 256.
@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0.5, "0.5"),
        ({"mlp": 0.5, "heads": 0.75}, "mlp 0.5, heads 0.75"),
        ({"mlp": [0.25, 0.375, 0.5, 0.625]}, "0.44 on average, 0.25 to 0.62 by site"),
        (
            {f"model.layers.{block}.mlp": 0.25 + block / 8 for block in range(4)},
            "0.44 on average, 0.25 to 0.62 by site",
        ),
        ({"model.layers.0.mlp": 0.25}, "0.44 on average, 0.25 to 0.62 by site"),
    ],
    ids=["one", "kinds", "blocks", "sites", "one site"],
)
def test_shares_are_in_words_in_the_header_and_in_the_settings(keep, words):
    even = report()
    sites = [dataclasses.replace(site, kept=8 * (2 + site.block)) for site in even.sites]
    shown = Document(page(report(sites=sites, settings={**even.settings, "keep": keep}))).text
    assert f"keep {words} · sites" in shown
    assert f" keep {words} sites mlp, heads" in shown  # the row of the settings
    assert not set("{}[]") & set(shown)
    assert keep_in_words(keep, sites) == words


class Document(HTMLParser):
    """Tags, attributes, visible text and tables of an HTML text; fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.tables = []  # rows of cells
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
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
        if self._open and self._open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data

    def table(self, first):
        """The rows of the table whose first cell is that, without the header."""
        return next(table[1:] for table in self.tables if table and table[0][0] == first)

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


@pytest.mark.parametrize("selector", ["wanda", "magnitude", "folding"])
def test_the_share_is_against_pruning_by_the_same_selector(selector):
    # By hand: ln(40/20) / ln(40/10) = 1/2; the report's own model ln(40/16) / ln(40/10) = 0.661.
    found = greedy(dense=10, pruned=40, compensated=20, restored=16)
    for row in found.values():
        row.selector = row.selector and row.selector.replace("wanda", selector)
    whole = report(evaluation=found)
    assert whole.same_choice == "compensated"
    assert whole.recovered == pytest.approx(0.5)
    assert headline(whole) == (
        "50%",
        f"of the log-perplexity lost by pruning ({selector}) is recovered",
    )
    text = Document(page(whole)).text
    assert f"pruned ({selector}) 40.0, compensated ({selector}) 20.0" in text
    assert "compensated (greedy): 16.0, 66% by selection and compensation together" in text


@pytest.mark.parametrize(
    "change", [{"selector": "greedy"}, {"uneven": True}], ids=["selector", "widths"]
)
def test_no_share_is_claimed_for_another_choice(change):
    found = rows(dense=10, pruned=40, restored=16)
    found["restored"] = dataclasses.replace(found["restored"], **change)
    whole = report(evaluation=found)
    assert whole.recovered is None
    assert "perplexity lost by" not in (text := Document(page(whole)).text)
    assert "66%" not in text


def test_every_row_says_what_it_is():
    found = greedy(dense=10, pruned=40, compensated=20, restored=16)
    found["restored"].uneven = True
    found["compensated"].compensation = "bias"
    table = Document(page(report(evaluation=found))).table("model")
    assert [row[:2] for row in table] == [
        ["dense", "10.0"],
        ["pruned (wanda)", "40.0"],
        ["bias compensated (wanda)", "20.0"],
        ["compensated (greedy, uneven)", "16.0"],
    ]


@pytest.mark.parametrize(
    ("sizes", "said", "unsaid"),
    [
        (
            {"source": 98e6, "after": 379e6, "bfloat16": 190e6},
            "source 98.0 MB, output 379 MB (float32); with --dtype bfloat16 it would be 190 MB; "
            "the source holds fewer bits a weight than the output",
            "nothing",
        ),
        ({"source": 98e6, "after": 61e6, "bfloat16": 61e6}, "output 61.0 MB", "bfloat16"),
        ({"after": 61e6, "bfloat16": 61e6}, "output 61.0 MB (float32)", "source"),
        ({}, "", "output"),
    ],
    ids=["quantised", "bf16", "source unknown", "unknown"],
)
def test_bytes_of_source_output_and_bf16_are_said(sizes, said, unsaid):
    whole = report(model={"name": "tiny", "dtype": "float32", "bytes": sizes})
    assert said in (sentence := size_sentence(whole))
    assert unsaid not in sentence
    assert sentence in Document(page(whole)).text


@pytest.mark.parametrize(
    ("perplexity", "repeats", "said"),
    [
        (11, 0.30, "usable as it is"),
        (11, 0.45, "repeats itself"),
        (20, 0.30, "predicts clearly worse"),
        (math.inf, 0.30, "predicts clearly worse"),
        (20, 0.45, "repeats itself"),
    ],
)
def test_it_is_said_whether_a_model_is_usable(perplexity, repeats, said):
    found = rows(dense=10, pruned=40, restored=perplexity)
    found["dense"].repetition, found["restored"].repetition = 0.25, repeats
    for row in (found["dense"], found["restored"]):
        row.repetition_error = 0.02
    whole = report(evaluation=found)
    assert said in verdict(whole)
    assert verdict(whole) in Document(page(whole)).text
    assert f"{100 * repeats:.0f} ± 2%" in Document(page(whole)).table("model")[2]


@pytest.mark.parametrize(("error", "said"), [(0.06, True), (0.12, False)])
def test_repetition_within_its_own_error_is_no_fault(error, said):
    found = rows(dense=10, pruned=40, restored=11)
    found["dense"].repetition, found["restored"].repetition = 0.25, 0.45
    for row in (found["dense"], found["restored"]):
        row.repetition_error = error  # twice that of the difference: 0.17 and 0.34
    whole = report(evaluation=found)
    assert ("repeats itself" in verdict(whole)) == said
    assert f"45 ± {100 * error:.0f}%" in verdict(whole)


@pytest.mark.parametrize(
    ("tokens", "repeats", "errors", "said"),
    [
        (31, 0.42, (0.06, 0.13), "too few tokens to judge"),
        (999, 0.25, (0.01, 0.01), "too few tokens to judge"),
        (4092, 0.42, (0.06, 0.13), "too few tokens to judge its repetition"),
        (4092, 0.25, (0.08, 0.08), "too few tokens to judge its repetition"),
        (4092, 0.25, (None, 0.01), "too few tokens to judge its repetition"),
        (4092, 0.25, (0.03, 0.04), "usable as it is"),
        (4092, 0.90, (0.08, 0.13), "repeats itself"),
    ],
)
def test_a_model_is_not_judged_by_less_than_tells(tokens, repeats, errors, said):
    found = rows(dense=10, pruned=40, restored=11)
    found["dense"].repetition, found["restored"].repetition = 0.15, repeats
    found["dense"].repetition_error, found["restored"].repetition_error = errors
    for row in found.values():
        row.tokens = tokens
    assert said in verdict(report(evaluation=found))
    assert ("usable as it is" in verdict(report(evaluation=found))) == (said == "usable as it is")


@pytest.mark.parametrize("restored", [41, 55, 900])
def test_a_model_worse_than_pruning_is_said_to_be_worse(restored):
    whole = report(evaluation=rows(dense=10, pruned=40, restored=restored))
    share = math.log(restored / 40) / math.log(4)
    assert headline(whole)[0] == f"{share:.0%} worse"
    text = Document(page(whole)).text
    assert "worse than plain pruning" in text
    assert "recover" not in text.partition("Notes")[0]
    assert "-" + f"{share:.0%}" not in text + repr(whole)


def test_nothing_is_said_to_be_repaired_where_nothing_was_compensated():
    sites = [dataclasses.replace(site, error=0.4) for site in report().sites]
    settings = {**report().settings, "compensate": False}
    shown = page(report(sites=sites, settings=settings))
    assert "Nothing was compensated" in shown
    assert "median 0.400 with plain pruning" in shown
    for word in ("improved", "compensation removed", ">compensated<"):
        assert word not in shown


def test_nothing_is_said_of_use_without_completions():
    assert verdict(report()) == ""
    assert "repeats" not in Document(page(report())).text


def test_completions_of_each_model_stand_under_their_prompt():
    sample = {"prompt": "The sky", "dense": "is blue", "pruned": "is is", "restored": "is <blue>"}
    text = Document(page(report(samples=[sample]))).text
    assert (
        "prompt The sky dense is blue pruned (magnitude) is is compensated (magnitude) is <blue>"
    ) in text


def test_no_phase_of_time_is_lost():
    seconds = {"forward": 4.0, "checkpoint": 3.0, "other": 1.0, "unheard of": 2.0, "total": 10.0}
    text = Document(page(report(seconds=seconds))).text
    for words in ("10.0 s in all", "3.00 s (30%)", "unheard of 2.00 s (20%)", "everything else"):
        assert words in text


def test_predicted_and_measured_time_stand_by_stage():
    stages = {
        "loading": {"predicted": 2.0, "measured": 3.0},
        "loss by site": {"measured": 4.0},
        "total": {"predicted": 2.0, "measured": 7.0},
    }
    assert Document(page(report(stages=stages))).table("stage") == [
        ["loading", "2.00 s", "3.00 s"],
        ["loss by site", "–", "4.00 s"],
        ["total", "2.00 s", "7.00 s"],
    ]


def test_the_origin_is_shown():
    origin = {
        "command": "grail compress a --keep 0.5",
        "date": "2026-01-02T03:04:05+00:00",
        "grail": "9.8.7",
        "commit": "cafe" * 10,
        "model": {"source": "a", "files": {"a.gguf": {"bytes": 5, "sha256": "be" * 32}}},
        "calibration": {"source": "a.txt", "tokens_sha256": "ef" * 32},
    }
    text = Document(page(report(provenance=origin))).text
    for word in ("--keep 0.5", "2026-01-02T03", "9.8.7", "cafe" * 10, "be" * 32, "ef" * 32):
        assert word in text


@pytest.mark.parametrize("name", ["tiny", "<b>bold</b>", "a & b"])
def test_a_report_shows_itself_in_a_line_and_in_a_table(name):
    whole = report(model={"name": name, "parameters": {"before": 1_500_000, "after": 1_000_000}})
    assert repr(whole) == (
        f"Report({name}, 1.50 M → 1.00 M parameters, 8 sites, wanda, 64% recovered)"
    )
    document = Document(whole._repr_html_())
    assert "b" not in document.tags
    assert name in document.text
    assert ["4 mlp", "128 of 256", "0.400 → 0.200"] in document.tables[0]
    assert ["compensated (magnitude)", "1.00 M", "25.7"] in document.tables[0]
    assert repr(Report({}, {}, {})) == "Report(model, 0 sites)"
    assert Document(Report({}, {}, {})._repr_html_()).tables


def test_a_report_of_an_earlier_form_can_be_read():
    data = json.loads(report().to_json())
    for row in data["evaluation"].values():
        for field in ("selector", "compensation", "uneven", "repetition"):
            del row[field]
        row["tokens_per_second"] = 512.0
    for field in ("stages", "samples", "provenance"):
        del data[field]
    whole = Report.from_json(json.dumps(data))
    table = Document(page(whole)).table("model")
    assert [row[0] for row in table] == ["dense", "pruned", "restored"]


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
    assert "64% of the log-perplexity lost by pruning (magnitude) is recovered" in text
    for cell in ("18.2", "47.4", "25.7", "1.00 M", "4.00 MB", "widths were rounded"):
        assert cell in text
    assert (
        "own work took 50% of the time of the forward passes" in text
    )  # (1 + 0.5 + 0.3 + 0.2) / 4
    assert "off by +10.0%" in text
    # Blocks 1 to 3: 0.13, 0.14 and 0.15.
    assert "input of attention was corrected in 3 blocks" in text
    assert "is 23.0% before and 14.0% after the correction" in text
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
                provenance={hostile: {hostile: [hostile]}},
                samples=[{"prompt": hostile, "dense": hostile, hostile: hostile}],
                stages={hostile: {"measured": 1.0}},
                seconds={hostile: 1.0},
                inputs=[dataclasses.replace(report().inputs[0], name=hostile)],
            )
        )
    )
    assert "evil" not in document.tags
    # Title, headline, 3 facts, 4 of samples, panel title, stage, phase, note, 2 · 2 of settings and
    # versions, 3 of settings, model, calibration, 3 of the origin, site row and input row.
    assert document.text.count(hostile) == 27


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
    assert len(drawings) == 1
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


def bar_lengths(html, title):
    """Widths in percent of the bars of a figure, from their style."""
    (figure,) = re.findall(rf"<figcaption>{title}.*?</figure>", html, re.DOTALL)
    styles = Document(f"<figure>{figure}").values("style")
    return [float(re.search(r"width: ([\d.]+)%", style)[1]) for style in styles]


@pytest.mark.parametrize(
    ("perplexities", "lengths"),
    [((10, 40, 20), (10, 40, 20)), ((10, 10_000, 100), (1, 4, 2))],
    ids=["linear", "logarithmic where one dwarfs the others"],
)
def test_perplexity_bars_are_in_proportion(perplexities, lengths):
    evaluated = rows(**dict(zip(("dense", "pruned", "restored"), perplexities, strict=True)))
    html = page(report(evaluation=evaluated, sites=[], seconds={}, memory={}))
    assert ("logarithmic" in html) == (perplexities != lengths)
    dense, pruned, restored = bar_lengths(html, "Perplexity")
    assert max(dense, pruned, restored) < 100  # room for a label
    # Widths are written with four decimals.
    assert dense / pruned == pytest.approx(lengths[0] / lengths[1], rel=1e-4)
    assert restored / pruned == pytest.approx(lengths[2] / lengths[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({"evaluation": {}}, "0.50× the output error of plain pruning", "perplexity lost"),
        ({"evaluation": rows(dense=10, restored=12)}, "0.50× the output error", "perplexity lost"),
        (
            {"evaluation": rows(dense=10, pruned=9, restored=9)},
            "no share of the lost log-perplexity",
            "perplexity lost by",
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
            "perplexity lost by",
        ),
        ({"evaluation": rows(dense=math.inf)}, "∞", "perplexity lost by"),
        ({"seconds": {}, "memory": {}}, "perplexity lost by", "Time and memory"),
        ({"notes": []}, "perplexity lost by", "Notes"),
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


def test_pages_are_reproducible():
    assert page(report()) == page(report())


def test_drawings_and_bars_shrink_with_the_screen():
    html = page(report())
    rules = dict(re.findall(r"([^{}]+)\{([^{}]*)\}", html[: html.index("</style>")]))
    rules = {selector.split()[-1]: style for selector, style in rules.items()}
    assert "width: 100%" in rules["svg"]
    for selector in ("svg", "figure", ".bars", ".bar"):
        assert not re.search(r"min-width:|(?<![-\w])width: \d+(rem|px|pt)", rules[selector])


def test_drawing_leaves_matplotlib_as_found():
    code = (
        "import sys, grail.report.page; assert 'matplotlib' not in sys.modules\n"
        "from grail.report.report import Evaluation, Report\n"
        "import matplotlib; before = matplotlib.rcParams.copy()\n"
        "rows = {'dense': Evaluation(10.0, 8, 8, 8)}\n"
        "grail.report.page.page(Report({}, {}, {}, evaluation=rows))\n"
        "assert matplotlib.rcParams.copy() == before and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
