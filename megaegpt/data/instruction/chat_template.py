"""Chat templates: conversations as the token ids that a model is given and learns.

A template is Jinja, as Hugging Face's tokenizers carry it, and renders what transformers'
``apply_chat_template`` renders, token for token. Two things are added to its text. Names of special
tokens in what people say are text: in ``<|im_end|>`` typed by a user nobody's turn ends. And it is
known what of the text the assistant says, which is what is learned.

For both, characters that no text has mark the places before a template is rendered and are taken
out after it.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megaegpt.data.instruction.conversations import Conversation, Message
from megaegpt.data.instruction.named_templates import NAMED_TEMPLATES
from megaegpt.data.instruction.template_process import TemplateProcess
from megaegpt.data.tokenizer import Tokenizer, whole_characters
from megaegpt.errors import DataError
from megaegpt.json_files import read_bytes

DATE_OF_TRAINING = datetime.datetime(2024, 7, 26)
"""What templates with a date are told in training, where the data must not change from day to day;
Llama 3.1's own default."""

_SECONDS = 10.0
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's code points for a program's own use; texts of people have none."""
_PROBE = (Message("user", "Question"), Message("assistant", "Answer"))
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Marks(NamedTuple):
    """Characters that are in no text of a conversation."""

    split: str
    """Within the name of a special token, which is text for it."""
    begin: str
    """Before what the assistant says."""
    end: str
    """Behind it."""
    stand_ins: dict[str, str]
    """Of special tokens whose names are one character, which cannot be split."""

    def taken_out(self, text: str) -> str:
        """What is said in a text that is protected."""
        names = {stand_in: name for name, stand_in in self.stand_ins.items()}
        table = str.maketrans({self.split: "", **names})
        return text.translate(table)


class EncodedChat(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    learned: list[bool]
    """Of each id: the assistant says it, or ends its turn with it."""


class ChatTemplate:
    """A template, rendered in a process of its own that ends with this object.

    Args:
        source: Jinja.
        name: for messages.
        seconds: a conversation may take so long.

    Example:
        >>> template = ChatTemplate(NAMED_TEMPLATES["chatml"], "chatml")
        >>> messages = (Message("user", "Hello?"),)
        >>> template.render(messages, {}, add_generation_prompt=True)
        '<|im_start|>user\\nHello?<|im_end|>\\n<|im_start|>assistant\\n'
    """

    def __init__(self, source: str, name: str, seconds: float = _SECONDS) -> None:
        self.source, self.name = source, name
        self._process = TemplateProcess(source, f"the chat template {name}", seconds)
        self._marks_generation = _GENERATION.search(source) is not None
        self._prompts = "add_generation_prompt" in source

    # -- text --------------------------------------------------------------------------------------

    def render(
        self,
        messages: Conversation,
        variables: Mapping[str, str],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
            variables: names of special tokens, such as ``bos_token``.
            add_generation_prompt: end with what comes before an answer.

        Raises:
            DataError: the template refuses the conversation, is no Jinja, or took too long.
        """
        wanted = _Rendering(messages, add_generation_prompt)
        return _need(self._render([wanted], variables, datetime.datetime.now())[0])

    def _render(
        self,
        wanted: Sequence[_Rendering],
        variables: Mapping[str, str],
        now: datetime.datetime,
    ) -> list[str | DataError]:
        """Several texts at once; the template's own errors are returned."""
        fixed = {"variables": dict(variables), "now": now.isoformat()}
        answers = self._process.ask(
            [
                {
                    "messages": [message.as_dict() for message in rendering.messages],
                    "add_generation_prompt": rendering.add_generation_prompt,
                    "marks": rendering.generation_marks,
                    **fixed,
                }
                for rendering in wanted
            ]
        )
        return [
            answer["text"]
            if "text" in answer
            else DataError(f"the chat template {self.name}: {answer['error']}")
            for answer in answers
        ]

    # -- tokens ------------------------------------------------------------------------------------

    def encode_prompt(self, messages: Conversation, tokenizer: Tokenizer) -> list[int]:
        """Ids of a conversation that a model is to go on with.

        Raises:
            DataError: as for :meth:`render`; or there are none.
        """
        marks = self._marks(messages, tokenizer)
        protected = _protect(messages, tokenizer, marks)
        text = self.render(protected, tokenizer.template_variables, add_generation_prompt=True)
        ids = _encode(text, tokenizer, marks, [])[0]
        if not ids:
            raise DataError(f"the chat template {self.name} writes nothing for this conversation")
        return ids

    def encode_training(self, messages: Conversation, tokenizer: Tokenizer) -> EncodedChat:
        """Ids of a whole conversation, and which of them are learned: what the assistant says and
        the special token that ends it, or what the template's ``{% generation %}`` encloses.

        What the template writes in front of every answer, and would at the end of a prompt, is not
        learned; what it writes there of an answer that is known already, such as an empty
        thought, is.

        Raises:
            DataError: as for :meth:`render`; or the template changes answers so that they cannot be
                found in its text.
        """
        marks = self._marks(messages, tokenizer)
        text, spans = self._find_answers(_protect(messages, tokenizer, marks), tokenizer, marks)
        ids, places = _encode(text, tokenizer, marks, [edge for span in spans for edge in span])
        learned = [False] * len(ids)
        for begin, end in zip(places[::2], places[1::2], strict=True):
            learned[begin[0] : end[1]] = [True] * (end[1] - begin[0])
        return EncodedChat(ids, learned)

    def end_tokens(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids at which a model that answers in this template stops: those that end any text, and
        the special token that the template puts behind an answer.

        Raises:
            DataError: as for :meth:`render`.
        """
        last = self._learned_of_probe(tokenizer)[-1:]
        return tokenizer.end_tokens | set(last).intersection(tokenizer.special_tokens.values())

    def end_text(self, tokenizer: Tokenizer) -> str:
        """What the template writes behind an answer where that is no special token of the
        tokenizer, blanks left out: an answer ends before it. Empty: it is one, or nothing.

        Raises:
            DataError: as for :meth:`render`.
        """
        learned = self._learned_of_probe(tokenizer)
        if not learned or learned[-1] in tokenizer.special_tokens.values():
            return ""
        return tokenizer.decode(learned).partition(_PROBE[-1].content)[2].strip()

    def _learned_of_probe(self, tokenizer: Tokenizer) -> list[int]:
        encoded = self.encode_training(_PROBE, tokenizer)
        return [token for token, learned in zip(*encoded, strict=True) if learned]

    def _marks(self, messages: Conversation, tokenizer: Tokenizer) -> Marks:
        said = {character for message in messages for character in message.content}
        used = said.union(self.source, *tokenizer.special_tokens)
        free = [character for character in _NONCHARACTERS if character not in used]
        names = [name for name in tokenizer.special_tokens if name in said]
        if len(free) < 3 + len(names):
            raise DataError("the conversation has all of Unicode's noncharacters, which mark texts")
        split, begin, end, *others = free
        return Marks(split, begin, end, dict(zip(names, others, strict=False)))

    def _find_answers(
        self, messages: Conversation, tokenizer: Tokenizer, marks: Marks
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and where in it the learned answers are."""
        places = [n for n, m in enumerate(messages) if m.role == "assistant" and m.learned]
        in_marks = (marks.begin, marks.end)
        if self._marks_generation:
            wanted = [_Rendering(messages), _Rendering(messages, generation_marks=in_marks)]
        else:
            wanted = [_Rendering(messages), _Rendering(_mark_answers(messages, places, marks))]
            wanted += [_Rendering(messages[:n], add_generation_prompt=True) for n in places]
            wanted += [_Rendering(messages[: n + 1]) for n in places]
        text, marked, *rest = self._render(wanted, tokenizer.template_variables, DATE_OF_TRAINING)
        text = _need(text)
        found = _marked_spans(marked, marks) if isinstance(marked, str) else None
        spans = found[1] if found is not None and found[0] == text else None
        if self._marks_generation:
            if spans is None:
                raise DataError(f"the chat template {self.name}: its generation tags are not whole")
            return text, spans
        before, until = rest[: len(places)], rest[len(places) :]
        if spans is not None and len(spans) != len(places):
            spans = None  # it leaves an answer out, or repeats one
        answers = [
            self._whole_answer(text, span, prompt, whole, tokenizer)
            for span, prompt, whole in zip(
                itertools.repeat(None) if spans is None else spans, before, until, strict=False
            )
        ]
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(answers)):
            raise DataError(f"the chat template {self.name} does not show answers in their order")
        return text, answers

    def _whole_answer(
        self,
        text: str,
        span: tuple[int, int] | None,
        prompt: str | DataError,
        whole: str | DataError,
        tokenizer: Tokenizer,
    ) -> tuple[int, int]:
        """From the end of the generation prompt to that of the turn.

        Args:
            span: of the message's own text, where it was found.
            prompt: the conversation before it, with the generation prompt.
            whole: the conversation until its end.
        """
        begin, end = (
            len(part) if isinstance(part, str) and text.startswith(part) else None
            for part in (prompt, whole)
        )
        if span is not None and not self._prompts:
            begin = None  # a conversation ends before the header of an answer then
        if span is None:
            if begin is None or end is None or end < begin:
                raise DataError(
                    f"the chat template {self.name} changes an answer, or the turns before it, so "
                    "that it is not found in the text: enclose in the template what is learned in "
                    "{% generation %} and {% endgeneration %}"
                )
            return begin, begin + len(text[begin:end].rstrip())
        if begin is None or begin > span[0]:
            begin = span[0]
        for part, token in tokenizer.split_special_tokens(text[span[1] :]):
            if token is not None:
                return begin, span[1] + text[span[1] :].index(part) + len(part)
            if not part.isspace():
                break
        return begin, max(span[1], end or 0)


class _Rendering(NamedTuple):
    """What is asked of a template."""

    messages: Conversation
    add_generation_prompt: bool = False
    generation_marks: tuple[str, str] = ("", "")


def load_chat_template(tokenizer: Tokenizer, wanted: str | None = None) -> ChatTemplate:
    """The template that is wanted.

    Args:
        tokenizer: may have one of its own.
        wanted: ``chatml``, ``llama3``, ``alpaca``, or a file of Jinja; None: the tokenizer's own.

    Raises:
        DataError: there is none, or the file cannot be read.
    """
    if wanted is None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"the tokenizer {tokenizer.name} has no chat template: name one of "
                f"{', '.join(NAMED_TEMPLATES)}, or give a file of Jinja"
            )
        return ChatTemplate(tokenizer.chat_template, f"of {tokenizer.name}")
    if wanted in NAMED_TEMPLATES:
        return ChatTemplate(_named_source(wanted, tokenizer), wanted)
    return ChatTemplate(read_template_file(wanted), wanted)


def read_template_file(file: str | Path) -> str:
    """Jinja of a chat template.

    Raises:
        DataError: it cannot be read.
    """
    try:
        source = read_bytes(Path(file)).decode("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8"
        raise DataError(
            f"the chat template {file} is none of {', '.join(NAMED_TEMPLATES)}, and no file that "
            f"can be read: {reason}"
        ) from None
    return source.replace("\r\n", "\n")


def _named_source(name: str, tokenizer: Tokenizer) -> str:
    """Alpaca's has no tokens of its own, and begins as tasks do that are in no template: with the
    tokenizer's BOS, where that is before every text.
    """
    source = NAMED_TEMPLATES[name]
    if name != "alpaca" or not tokenizer.adds_bos:
        return source
    names = {token: special for special, token in tokenizer.special_tokens.items()}
    begin = names.get(tokenizer.first_token, "")
    first, later = (tokenizer.encode_part("a", is_first) for is_first in (True, False))
    if first != later:  # the blank before a text's first word, which is not put behind a token
        begin += " "
    return f"{{{{ {json.dumps(begin, ensure_ascii=False)} }}}}{source}"


# -- marks -----------------------------------------------------------------------------------------


def _need(text: str | DataError) -> str:
    if isinstance(text, DataError):
        raise text
    return text


def _protect(messages: Conversation, tokenizer: Tokenizer, marks: Marks) -> Conversation:
    """Messages in which no name of a special token is whole, nor can become so by what a template
    writes beside them.
    """
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    if not names:
        return messages
    within = re.compile("|".join(re.escape(name) for name in names))
    starts = {name[:length] for name in names for length in range(1, len(name))}
    ends = {name[-length:] for name in names for length in range(1, len(name))}
    longest = max(map(len, names))
    stand_ins = str.maketrans(marks.stand_ins)

    def protect(text: str) -> str:
        text = text.translate(stand_ins)
        text = within.sub(lambda m: m[0][0] + marks.split + m[0][1:], text)
        body = text.rstrip()
        if any(body[-length:] in starts for length in range(1, min(longest, len(body) + 1))):
            text = body + marks.split + text[len(body) :]
        body = text.lstrip()
        if any(body[:length] in ends for length in range(1, min(longest, len(body) + 1))):
            text = text[: len(text) - len(body)] + marks.split + body
        return text

    return tuple(
        dataclasses.replace(message, content=protect(message.content)) for message in messages
    )


def _mark_answers(messages: Conversation, places: Sequence[int], marks: Marks) -> Conversation:
    """Marks around the answers; inside their outer white space, which templates may take off."""

    def mark(text: str) -> str:
        body = text.strip()
        before = text[: len(text) - len(text.lstrip())]
        after = text[len(before) + len(body) :]
        return f"{before}{marks.begin}{body}{marks.end}{after}"

    return tuple(
        dataclasses.replace(message, content=mark(message.content)) if number in places else message
        for number, message in enumerate(messages)
    )


def _marked_spans(text: str, marks: Marks) -> tuple[str, list[tuple[int, int]]] | None:
    """A text without its marks and the places that they enclosed; None: they are not in pairs."""
    plain, spans, length, begin = [], [], 0, None
    for part in re.split(f"([{marks.begin}{marks.end}])", text):
        if part == marks.begin and begin is None:
            begin = length
        elif part == marks.end and begin is not None:
            spans.append((begin, length))
            begin = None
        elif part in (marks.begin, marks.end):
            return None
        else:
            plain.append(part)
            length += len(part)
    return None if begin is not None else ("".join(plain), spans)


# -- tokens ----------------------------------------------------------------------------------------


def _encode(
    text: str, tokenizer: Tokenizer, marks: Marks, cuts: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text whose special tokens are the template's own, what protects others taken out.

    Args:
        cuts: places in ``text``.

    Returns:
        The ids, and for each cut how many of them lie before it as a whole and how many in part.
    """
    ids: list[int] = []
    places: dict[int, tuple[int, int]] = {}
    start = 0
    for part, token in tokenizer.split_special_tokens(text):
        plain = marks.taken_out(part)
        own = [token] if token is not None else tokenizer.encode_part(plain, is_first=start == 0)
        for cut in cuts:
            if cut == start:
                places[cut] = (len(ids), len(ids))
            elif start < cut < start + len(part):
                prefix = marks.taken_out(part[: cut - start])
                whole, touched = (
                    _count_before(own, plain, prefix, start == 0, tokenizer)
                    if token is None
                    else (0, 1)
                )
                places[cut] = (len(ids) + whole, len(ids) + touched)
        ids += own
        start += len(part)
    return ids, [places.get(cut, (len(ids), len(ids))) for cut in cuts]


def _count_before(
    ids: list[int], text: str, prefix: str, is_first: bool, tokenizer: Tokenizer
) -> tuple[int, int]:
    """Ids of ``text`` that lie within its ``prefix``, and those that begin within it."""
    ends = tokenizer.token_byte_lengths[ids].cumsum()
    if len(ends) and ends[-1] == len(whole_characters(text).encode()):
        length = len(whole_characters(prefix).encode())
        whole = int(np.searchsorted(ends, length, side="right"))
        exact = length == 0 or (whole > 0 and ends[whole - 1] == length)
        return whole, whole if exact else whole + 1
    # Texts that a normalizer changes have other bytes: ids that do not change with what follows.
    alone = tokenizer.encode_part(prefix, is_first)
    pairs = zip(ids, alone, strict=False)
    whole = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(alone)))
    return whole, whole if whole == len(alone) else whole + 1
