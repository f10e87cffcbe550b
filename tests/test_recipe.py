"""What options ask of an architecture, and what they refuse."""

import re

import pytest

from grail import select
from grail.errors import InputError
from grail.networks import find
from grail.recipe import Recipe


def test_shares_are_for_kinds_blocks_and_single_sites(tiny_llama):
    keep = {"mlp": [0.5, 0.75], "model.layers.0.mlp": 0.25, "heads": 0.5}  # heads are not narrowed
    widths = Recipe(keep, sites=("mlp",), multiple=1).widths(find(tiny_llama()))
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
        Recipe(keep, sites=("mlp",)).widths(find(tiny_llama()))


@pytest.mark.parametrize(
    ("asked", "found"),
    [("Wanda", "wanda"), ("WANDA++", "wanda++"), (" magnitude_l1 ", "magnitude-l1")],
)
def test_selectors_and_kinds_are_found_in_any_case(asked, found):
    options = Recipe(selector=asked, sites="MLP, heads mlp")
    assert (options.selector, options.sites) == (found, ("mlp", "heads"))
    assert select.get(asked) is select.get(found)


@pytest.mark.parametrize("name", select.names())
@pytest.mark.parametrize("wrong", [lambda n: n[:2] + n[3:], lambda n: n[0] + n[2] + n[1] + n[3:]])
def test_a_misspelt_selector_is_answered_with_the_nearest(name, wrong):
    with pytest.raises(InputError, match=re.escape(f"did you mean {name!r}?")):
        Recipe(selector=wrong(name))


def test_a_name_like_no_selector_gets_the_list_alone():
    with pytest.raises(InputError, match="unknown selector 'best'; choose one of backward"):
        select.get("best")
