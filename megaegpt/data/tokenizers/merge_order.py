"""When merging bytes by the ranks of tokens, as tiktoken does, gives what Hugging Face's merge
rules give.

tiktoken merges two neighbours wherever a token of their bytes exists, the token of lowest rank
first; Hugging Face merges pairs that are in a list, the first of the list first. While a span of
bytes becomes one token, neither sees what is around it: every token has one last pair that it can
be merged of, whatever the text. So both do the same on every text if every token can be made by the
rules, and the ranks are in the order of the rules that make them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers.models import BPE

from megaegpt.data.tokenizers.byte_alphabet import CHARACTER_OF_BYTE


@dataclass(frozen=True)
class MergeOrder:
    """Tokens, as they are spelled, in the order of their ranks.

    Attributes:
        bytes_without_token: single bytes that no token stands for.
        tokens: single bytes, then the merged ones.
        whole_words: tokens that no rule makes, and that stand for words that they are all of.
    """

    bytes_without_token: list[str]
    tokens: list[str]
    whole_words: list[str]


def merge_order(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], ignore_merges: bool
) -> MergeOrder | None:
    """Ranks that do what merge rules do; None: there are none.

    Args:
        vocabulary: id of every token, spelled in the byte alphabet.
        merges: pairs of tokens; what they make is in the vocabulary.
        ignore_merges: a word that is a token is that token, whatever the rules would make of it.
    """
    rules: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for place, (first, second) in enumerate(merges):
        rules[first + second].setdefault((first, second), place)
    alphabet = list(CHARACTER_OF_BYTE.values())
    model = BPE(dict(vocabulary), list(merges))
    place_of: dict[str, int] = {}
    whole_words = []
    for token in vocabulary:
        if len(token) < 2:
            continue
        parts = [part.value for part in model.tokenize(token)]
        if parts == [token]:
            place_of[token] = _place_of_last_rule(token, rules)
        elif ignore_merges and set(token) <= set(alphabet):
            if len(parts) <= 2:
                return None  # tiktoken would merge the two inside of longer words as well
            whole_words.append(token)
    return MergeOrder(
        [character for character in alphabet if character not in vocabulary],
        [
            *(character for character in alphabet if character in vocabulary),
            *sorted(place_of, key=place_of.__getitem__),
        ],
        whole_words,
    )


def _place_of_last_rule(token: str, rules: Mapping[str, Mapping[tuple[str, str], int]]) -> int:
    """Where in the list the rule is that makes ``token`` of the two parts left of it."""
    of_token = rules[token]
    if len(of_token) == 1:
        return next(iter(of_token.values()))
    parts = list(token)
    while len(parts) > 2:
        places = [
            rules.get(a + b, {}).get((a, b), float("inf")) for a, b in itertools.pairwise(parts)
        ]
        at = places.index(min(places))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return of_token[parts[0], parts[1]]
