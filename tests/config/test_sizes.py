"""Sizes of workers and tickets: how they are written, what they come to of a model, and what is refused."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.blueprint.division import Division, Setting
from twist_fl.config.shares import normal_size, read_size
from twist_fl.config.sizes import held_of, ticket_size, ticket_sizes
from twist_fl.report.compare import kappa
from twist_fl.system.errors import ConfigError
from twist_fl.system.units import size_label

SETTINGS: tuple[Setting, ...] = ("attn", "ffn", "both")


def layout_of(heads: int, ffn_blocks: int) -> Layout:
    sizes = {"n_embd": heads, "n_head": heads, "n_inner": ffn_blocks, "n_layer": 4}
    return make_layout({"model_type": "gpt2", "vocab_size": 2, "n_positions": 2, **sizes}, ffn_blocks)


def division(setting: Setting) -> Division:
    return Division(setting, (), 1, 1)


@pytest.mark.parametrize(
    ("written", "held"),
    [
        ("4", (1, 4)),  # blocks of the kind that has most; of the other as large a part, to the nearest block
        ("1/3", (1, 4)),
        ("50%", (2, 6)),
        ("0.5", (2, 6)),
        ("1/100", (1, 1)),
        ("1/1", (3, 12)),
        ("3+6", (3, 6)),
        ("3/3+1/2", (3, 6)),
        ("1+50%", (1, 6)),
    ],
)
def test_what_a_size_comes_to(written: str, held: tuple[int, int]) -> None:
    """As of SmolLM2: 3 key/value groups and 12 blocks of the FFN."""
    assert held_of(layout_of(3, 12), "both", "--size", written) == held


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(SETTINGS), st.fractions(Fraction(1, 50), 1))
def test_a_share_is_each_divided_kinds_to_the_nearest_block(
    heads: int, ffn_blocks: int, setting: Setting, share: Fraction
) -> None:
    layout = layout_of(heads, ffn_blocks)
    held = held_of(layout, setting, "--size", f"{share.numerator}/{share.denominator}")
    for i, (number, of) in enumerate(zip(held, layout.num_blocks, strict=True)):
        if setting in ("both", ("attn", "ffn")[i]):
            assert number == 1 or abs(number - share * of) <= Fraction(1, 2)
            assert 1 <= number <= of
        else:
            assert number == of


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(SETTINGS))
def test_every_size_of_a_model_is_written_so_that_it_is_read_again(
    heads: int, ffn_blocks: int, setting: Setting
) -> None:
    layout, divided = layout_of(heads, ffn_blocks), division(setting)
    found = ticket_sizes(layout, divided)
    assert found[-1].is_whole
    assert len(set(found)) == len(found)
    assert [sum(size.num_sub) for size in found] == sorted(sum(size.num_sub) for size in found)
    for size in found:
        assert ticket_size(layout, divided, size.row["size"]) == size
        assert 0 < kappa(size_label(size.row)) <= float(size.share) <= 1


def test_labels_are_one_share_or_both() -> None:
    layout = layout_of(3, 12)
    labels = [size_label(ticket_size(layout, division("both"), size).row) for size in ("1/3", "1/2", "3+6")]
    assert labels == ["4/12", "2/3+6/12", "3/3+6/12"]
    assert kappa("3/3+6/12") == 0.75


@given(st.from_regex(r"(\d{1,3}|\d{1,3}/\d{1,3}|\d{1,2}%|0\.\d{1,3})(\+(\d{1,3}|\d{1,2}%))?", fullmatch=True))
def test_a_size_is_kept_as_it_was_meant(written: str) -> None:
    try:
        amounts = read_size("--size", written)
    except ConfigError:
        assert "/0" in written
        return
    assert read_size("--size", normal_size("--size", written)) == amounts


@pytest.mark.parametrize(
    ("written", "setting", "message"),
    [
        ("13", "both", "--size 13 of a layer's 12 blocks is impossible: choose 1 to 12"),
        ("4+4", "both", "--size 4+4 of a layer's 3 blocks is impossible: choose 1 to 3"),
        ("0", "both", "--size 0 of a layer's 12 blocks is impossible: choose 1 to 12"),
        ("-1/2", "both", "--size -1/2 of a layer's 12 blocks is impossible: choose 1 to 12"),
        ("120%", "ffn", "--size 120% of a layer's 12 blocks is impossible: choose 1 to 12"),
        ("3+6", "ffn", "--size 3+6 is a size for attention+FFN, and blueprint.setting=ffn divides one of them"),
        ("half", "both", "--size half must be a number of blocks (6), a share of a layer (1/2, 50%), or both for"),
        ("6.5", "both", "--size 6.5 must be a number of blocks"),
        ("1/0", "both", "--size 1/0 must be a number of blocks"),
        ("", "both", "must be a number of blocks"),
        (True, "both", "--size True must be a number of blocks"),
        ([1], "both", "--size [1] must be a number of blocks"),
    ],
)
def test_a_size_that_cannot_be_is_refused(written: object, setting: Setting, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        held_of(layout_of(3, 12), setting, "--size", written)
