"""Tables on narrow terminals."""

import pytest

from grail.commands.console import print_table

LABELS = ["compensated (folding-agglomerative, uneven)", "dense", "a]b[c"]
NUMBERS = [["18.4 s", "1.25 M", "539 MB", "25 ± 4%"], ["–", "2", "3", "4"], ["1", "", "x", "y"]]


@pytest.mark.parametrize("width", [20, 40, 47, 60, 80, 131])
@pytest.mark.parametrize("columns", [1, 2, 4])
def test_every_cell_is_legible_at_every_width(width, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    header = ["model", "perplexity", "parameters", "weights", "repeats"][: columns + 1]
    print_table(header, [[a, *b[:columns]] for a, b in zip(LABELS, NUMBERS, strict=True)])
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(name in out for name in header[1:])
    for cells in NUMBERS:
        assert all(cell in out for cell in cells[:columns])
    squeezed = "".join(out.split())
    assert all(word in squeezed for label in LABELS[1:] for word in label.split())
    if columns == 1 or width >= 60:  # a table, whose lines fit
        assert all(len(line) <= width for line in out.splitlines()) or width == 20
