"""Ranks do what merge rules do, or there are no ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.models import BPE

from megaegpt.data.tokenizers.byte_alphabet import CHARACTER_OF_BYTE, unspell
from megaegpt.data.tokenizers.byte_pair_core import BytePairCore
from megaegpt.data.tokenizers.merge_order import MergeOrder, merge_order


@st.composite
def rules(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Any merge rules over a few letters, in any order, several for one token among them."""
    tokens = ["a", "b", "c"]
    pairs: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 9))):
        pair = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if pair not in pairs:
            pairs.append(pair)
            tokens += [pair[0] + pair[1]] if pair[0] + pair[1] not in tokens else []
    return {token: number for number, token in enumerate(tokens)}, draw(st.permutations(pairs))


def core_of(order: MergeOrder, vocabulary: dict[str, int]) -> BytePairCore:
    spelled = [*order.bytes_without_token, *order.tokens, *order.whole_words]
    ids = np.array([vocabulary.get(token, -1) for token in spelled])
    tokens = [unspell(token) or b"" for token in spelled]
    return BytePairCore(tokens, ids, len(order.bytes_without_token), r"(?s:.+)")


@settings(max_examples=400, deadline=None)
@given(rules(), st.booleans(), st.lists(st.text("abc", min_size=1, max_size=12), max_size=8))
def test_ranks_give_the_ids_of_the_rules(
    made: tuple[dict[str, int], list[tuple[str, str]]], ignore_merges: bool, words: list[str]
) -> None:
    vocabulary, merges = made
    order = merge_order(vocabulary, merges, ignore_merges)
    model = BPE(vocabulary, merges, ignore_merges=ignore_merges)
    if order is None:
        assert ignore_merges
        return
    core = core_of(order, vocabulary)
    for word in [*words, *vocabulary]:
        found = core.encode(word)
        assert found is not None
        assert found.tolist() == [token.id for token in model.tokenize(word)], word


def test_a_token_that_no_rules_make_is_not_merged() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]  # "abc" is cut into a and bc
    order = merge_order(vocabulary, merges, False)
    assert order is not None
    assert [token for token in order.tokens if len(token) > 1] == ["bc", "ab"]
    assert merge_order(vocabulary, merges, True) is None


def test_bytes_without_a_token_have_no_id() -> None:
    vocabulary = {CHARACTER_OF_BYTE[byte]: byte for byte in range(255)}
    order = merge_order(vocabulary, [], False)
    assert order is not None
    core = core_of(order, vocabulary)
    assert core.encode("a") is not None
    assert order.bytes_without_token == [CHARACTER_OF_BYTE[255]]
