"""What options ask of an architecture, and what they refuse."""

import pytest

from grail.errors import InputError
from grail.options import Options
from grail.sites import find


def test_shares_are_for_kinds_blocks_and_single_sites(tiny_llama):
    keep = {"mlp": [0.5, 0.75], "model.layers.0.mlp": 0.25, "heads": 0.5}  # heads are not narrowed
    widths = Options(keep, sites=("mlp",), multiple=1).widths(find(tiny_llama()))
    assert {name: width.kept for name, width in widths.items()} == {
        "model.layers.0.mlp": 20,
        "model.layers.1.mlp": 60,
    }


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"mlp": 0.5, "haeds": 0.2}, r"keep names haeds; .* kinds heads, mlp and .*layers\.0\.mlp"),
        ({"mlp": 0.5, "model.layers.1.mpl": 0.2}, r"keep names model\.layers\.1\.mpl;"),
        ({"mlp": [0.5, 0.5, 0.9]}, "3 shares for mlp, one for each block; there are 2 blocks"),
    ],
    ids=["kind", "site", "blocks"],
)
def test_shares_of_what_is_not_there_are_refused(keep, said, tiny_llama):
    with pytest.raises(InputError, match=said):
        Options(keep, sites=("mlp",)).widths(find(tiny_llama()))
