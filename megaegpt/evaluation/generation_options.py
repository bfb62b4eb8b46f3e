"""The generation options of a harness task, understood as the harness' own model understands them.

That is lm-evaluation-harness' ``HFLM`` with the defaults of transformers' ``generate``: greedy
unless the task samples, and then among the 50 likeliest tokens unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaegpt.config import GenerationConfig
from megaegpt.data.tokenizer import END_OF_TEXT
from megaegpt.errors import ConfigError

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the longest continuation, the first given one of which counts."""

_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
"""Options of transformers that tasks set to what happens anyway; no other value is offered."""

_KNOWN = (*_LENGTH_NAMES, "until", "do_sample", "temperature", "top_k", "top_p", *_WITHOUT_EFFECT)


@dataclass(frozen=True)
class GenerationOptions:
    """How one text is continued."""

    config: GenerationConfig
    """Its seed is not decided by a task."""
    until: tuple[str, ...]
    """Texts at which the continuation ends, which are not part of it."""

    def ends(self, text: str, new: int) -> bool:
        """Whether one of ``until`` is in ``text``, whose last ``new`` characters have just come."""
        return any(
            text.find(end, max(len(text) - new - len(end) + 1, 0)) >= 0 for end in self.until
        )

    def cut(self, text: str) -> str:
        """``text`` up to what ends it."""
        for end in filter(None, self.until):
            text = text.split(end)[0]
        return text


def read_options(options: Mapping[str, Any], end_of_text: str = END_OF_TEXT) -> GenerationOptions:
    """The ``generation_kwargs`` of a request.

    Args:
        end_of_text: the name of the token that ends a document.

    Raises:
        ConfigError: one is not known, or has a value that the harness or this program refuses.
    """
    for name, value in options.items():
        if name not in _KNOWN:
            raise ConfigError(
                f"the task sets the generation option {name}={value!r}, which is not offered; "
                f"known are {', '.join(_KNOWN)}"
            )
        if name in _WITHOUT_EFFECT and value != _WITHOUT_EFFECT[name]:
            raise ConfigError(
                f"the task sets {name}={value!r}, and only {name}={_WITHOUT_EFFECT[name]} is "
                "offered: leave the task out"
            )
    given = [options[name] for name in _LENGTH_NAMES if options.get(name) is not None]
    config = GenerationConfig(
        max_new_tokens=_number(int, _LENGTH_NAMES[0], given[0] if given else 256),
        **_sampling(options),
    )
    return GenerationOptions(config, _until(options.get("until"), end_of_text))


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature, top_k and top_p of a :class:`GenerationConfig`."""
    temperature = _number(float, "temperature", options.get("temperature", 0.0))
    sampled = options.get("do_sample")
    if sampled not in (None, True, False):
        raise ConfigError(f"the task sets do_sample={sampled!r}: it must be true or false")
    if sampled is False or (sampled is None and temperature <= 0):
        return {"temperature": 0.0, "top_k": None, "top_p": None}
    if temperature == 0:
        raise ConfigError(
            "the task sets do_sample=true without a temperature above 0, which the harness "
            "refuses too: give a temperature, or do_sample=false"
        )
    top_k = _number(int, "top_k", 0 if (k := options.get("top_k", 50)) is None else k)
    top_p = _number(float, "top_p", 1.0 if (p := options.get("top_p")) is None else p)
    if top_p == 0:  # the likeliest token is always kept
        top_k, top_p = 1, 1.0
    return {"temperature": temperature, "top_k": top_k or None, "top_p": top_p}


def _until(until: Any, end_of_text: str) -> tuple[str, ...]:
    """With the end of a document, whose name may also be written in characters."""
    ends = [] if until is None else [until] if isinstance(until, str) else until
    if not isinstance(ends, list) or not all(isinstance(end, str) for end in ends):
        raise ConfigError(f"the task sets until={until!r}: it must be a text or a list of texts")
    return (*ends,) if end_of_text in ends else (*ends, end_of_text)


def _number(kind: type[int] | type[float], name: str, value: Any) -> Any:
    """Numbers may be written as text."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"the task sets {name}={value!r}: it must be a number") from None
