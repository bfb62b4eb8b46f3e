"""Renders one chat template, in a process of its own: run as a program, never imported.

A template comes from wherever its tokenizer comes from, and is a program: it can loop for ever or
ask for any amount of memory, and only the end of its process stops that. So this file imports
nothing of the package. It reads and writes lines of JSON: it says ``null`` when it is ready, is
given the template, then lists of renderings, and answers each by the list of their texts or errors,
until its input ends.

The environment is that of transformers' ``apply_chat_template``
(``transformers/utils/chat_template_utils.py``): Jinja's immutable sandbox, its white space, tags
and functions.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

_MOST_MEMORY = 1 << 30
_LONGEST_S = 60
"""A worker ends by itself then, if whoever started it is gone and has not ended it."""


class Generation(jinja2.ext.Extension):
    """``{% generation %}``: what the assistant writes, which gets the marks of the rendering."""

    tags = {"generation"}  # noqa: RUF012, as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Turn the tag and its end into a call of :meth:`_marked`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        begin, end = self.environment.generation_marks  # type: ignore[attr-defined]
        return f"{begin}{caller()}{end}"


class Namespace(jinja2.utils.Namespace):
    """Without names that lead into Python's objects."""

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)


def _namespace(**values: Any) -> Namespace:
    made = Namespace()
    for name, value in values.items():
        made[name] = value
    return made


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment in which transformers renders chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, dict=_make_dict, namespace=_namespace
    )
    environment.extend(generation_marks=("", ""))
    return environment


def render(template: jinja2.Template, request: dict[str, Any]) -> dict[str, str]:
    """The text of one rendering, or why there is none."""
    now = datetime.datetime.fromisoformat(request["now"])
    template.environment.generation_marks = request["marks"]  # type: ignore[attr-defined]
    try:
        return {
            "text": template.render(
                messages=request["messages"],
                tools=None,
                documents=None,
                add_generation_prompt=request["add_generation_prompt"],
                strftime_now=now.strftime,
                **request["variables"],
            )
        }
    except (MemoryError, RecursionError) as error:
        return {"error": f"it takes too much memory ({type(error).__name__})"}
    except Exception as error:  # whatever a template does is its own fault
        return {"error": f"{error}" or type(error).__name__}


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started it
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    _answer(None)
    lines = iter(sys.stdin.readline, "")
    source = json.loads(next(lines))
    try:
        template = make_environment().from_string(source)
    except (jinja2.exceptions.TemplateError, RecursionError, MemoryError) as error:
        replies: Any = {"error": f"it is no valid template: {error}"}
        template = None
    for line in lines:
        signal.alarm(_LONGEST_S)
        if template is not None:
            replies = [render(template, request) for request in json.loads(line)]
        _answer(replies)
        signal.alarm(0)


if __name__ == "__main__":
    main()
