"""The table of targets and the rules of widths, against arithmetic written out."""

import pytest

from grail.algebra import targets
from grail.algebra.targets import RULES, TARGETS, as_multiple
from grail.algebra.width import ChannelWidth, HeadWidth
from grail.errors import InputError
from grail.recipe import Recipe

EVERY = {str(rule) for rule in RULES}


def fitted(width):
    return {str(rule) for rule in RULES if width.splits(rule.parts, rule.multiple)}


@pytest.mark.parametrize(
    ("kept", "rules"),
    [
        (1072, {"tensor parallel: 2", "tensor parallel: 4", "tensor parallel: 8"}),  # 16·67
        (36, {"tensor parallel: 2", "tensor parallel: 4"}),
        (35, set()),
        (1024, EVERY),
        (
            1344,  # 64·21
            EVERY
            - {"groups: 128", "GGUF blocks: 256"}
            - {f"TP, groups of 128: {parts}" for parts in (2, 4, 8)},
        ),
        # 43·128, 21.5·256: an odd number of groups cannot be split.
        (
            5504,
            EVERY - {"GGUF blocks: 256"} - {f"TP, groups of 128: {parts}" for parts in (2, 4, 8)},
        ),
        (14336 // 2, EVERY),  # 7·1024
    ],
)
def test_a_width_of_channels_fits_what_divides_it(kept, rules):
    assert fitted(ChannelWidth(2 * kept, kept)) == rules


@pytest.mark.parametrize(
    ("heads", "parts"),
    [
        ((2, 3, 64), {2}),  # a key/value head each; 4 parts would cut one of 6 heads
        ((2, 2, 64), {2, 4}),  # 4 parts hold a copy of a key/value head each
        ((6, 2, 64), {2}),  # 12 heads in 4 parts, but 6 key/value heads are no 4 whole ones
        ((1, 7, 64), set()),
        ((1, 8, 64), {2, 4, 8}),  # copies of the only key/value head
    ],
)
def test_heads_are_split_whole_with_their_key_value_heads(heads, parts):
    groups, queries, head_dim = heads
    width = HeadWidth(8, 8, head_dim, groups, queries)
    found = {p for p in (2, 4, 8) if width.splits(p, 1)}
    assert found == parts
    assert width.splits(1, 128) == (groups * queries * head_dim % 128 == 0)


def test_a_part_of_heads_has_whole_groups_of_weights():
    width = HeadWidth(8, 4, 64, 4, 2)  # 8 heads of 64: 512 channels
    assert [width.splits(parts, 128) for parts in (1, 2, 4, 8)] == [True, True, True, False]


@pytest.mark.parametrize(("name", "number"), [("gptq", 128), ("gguf", 256), ("vllm", 1024)])
def test_a_name_is_a_number_in_any_case(name, number):
    assert as_multiple(name) == as_multiple(f" {name.upper()}") == number
    assert ChannelWidth.nearest(8960, 0.7, name) == ChannelWidth.nearest(8960, 0.7, number)
    assert Recipe(multiple=name) == Recipe(multiple=number)
    assert Recipe.from_dict({"multiple": name}).as_dict()["multiple"] == number


def test_a_target_serves_what_it_says():
    by_use = {
        "gptq": [rule for rule in RULES if rule.use == "groups"],
        "gguf": [rule for rule in RULES if rule.use == "GGUF blocks"],
        "vllm": [rule for rule in RULES if rule.use in ("tensor parallel", "TP, groups of 128")],
    }
    assert by_use.keys() == TARGETS.keys()
    for name, rules in by_use.items():
        least = TARGETS[name].multiple
        for times in (1, 3, 7):
            width = ChannelWidth(10**6, times * least)
            assert all(width.splits(rule.parts, rule.multiple) for rule in rules), name
        # The half of it serves less: the number is no larger than it must be.
        assert not all(
            ChannelWidth(10**6, least // 2).splits(rule.parts, rule.multiple) for rule in rules
        )


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(
        InputError, match=r"gptq \(128\), gguf \(256\), vllm \(1024\); did you mean"
    ):
        Recipe(multiple="gtpq")
    with pytest.raises(InputError, match=r"vllm \(1024\); got 'mlx'"):
        as_multiple("mlx")


def test_the_help_of_the_option_names_every_target():
    (field,) = (f for f in Recipe.__dataclass_fields__.values() if f.name == "multiple")
    for name, target in TARGETS.items():
        assert f"{name} is {target.multiple} ({target.serves})" in field.metadata["help"]
    assert targets.in_words() in field.metadata["help"]
