"""Raw keys that the installed DeepSpeed does not have, and what they probably should be.

DeepSpeed refuses unknown keys of the sections that it reads by pydantic models, and passes over
all others. So it is given its configuration as mappings that note which keys it asks for.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megaegpt.config.deepspeed_keys import OWNED_KEYS, dotted_keys
from megaegpt.config.run import RunConfig
from megaegpt.config.suggestions import LIKELY_RUN_KEYS, KeyFinder


class NotedMapping(dict[str, Any]):
    """A mapping that notes which of its keys are asked for, nested mappings included.

    Attributes:
        asked: keys that were looked for by name, those that are not there too.
        iterated: whether it was read as a whole, so that every key counts as asked for.
    """

    def __init__(self, content: dict[str, Any], asked: set[Any] | None = None) -> None:
        super().__init__(
            (key, NotedMapping(value) if type(value) is dict else value)
            for key, value in content.items()
        )
        self.asked: set[Any] = set() if asked is None else asked
        self.iterated = False

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.iterated = True
        return super().__iter__()

    def keys(self) -> Any:
        """A view whose ``in`` asks for one key."""
        return KeysView(self)

    def items(self) -> Any:
        """A view whose iteration reads the whole."""
        return ItemsView(self)

    def __copy__(self) -> NotedMapping:
        return NotedMapping(dict(dict.items(self)), self.asked)

    def unknown(self) -> Iterator[tuple[str, list[str]]]:
        """Each key that was not asked for, dotted, and the names that were, in its section.

        A section that was read as a whole, or whose reader asked for nothing by name, has none.
        """
        for key, value in dict.items(self):
            if self.asked and not self.iterated and key not in self.asked:
                yield key, sorted(map(str, self.asked))
            elif isinstance(value, NotedMapping):
                for name, known in value.unknown():
                    yield f"{key}.{name}", known


def say_unknown(dotted: str, known: Iterable[str]) -> str:
    """What is to be said of a raw key that DeepSpeed does not have.

    Args:
        dotted: the key, without the section ``deepspeed`` of a run's configuration.
        known: keys of its section.
    """
    *section, name = dotted.split(".")
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        meant = ".".join([*section, near[0]])
        hint = OWNED_KEYS.get(meant, f"deepspeed.{meant}")
    else:
        finder = KeyFinder(RunConfig, likely=LIKELY_RUN_KEYS)
        hint = " or ".join(finder.find(name, RunConfig, ""))
    question = f"; did you mean {hint}?" if hint else ""
    release = importlib.metadata.version("deepspeed")
    return f"deepspeed.{dotted} is no key of DeepSpeed {release}{question}"


def say_refused(error: ValidationError, options: dict[str, Any]) -> list[str]:
    """What is to be said of each value that a pydantic model of DeepSpeed refuses.

    Args:
        options: all that DeepSpeed was given; errors name a place within one of its sections.
    """
    lines = []
    for found in error.errors():
        names = [str(name) for name in found["loc"]]
        ending = ".".join(names)
        paths = (path for path, _ in dotted_keys(options) if f".{path}".endswith(f".{ending}"))
        path = next(paths, ending)
        if found["type"] == "extra_forbidden":
            lines.append(say_unknown(path, _fields(error.title, names[:-1])))
        else:
            lines.append(f"{path}: {found['msg']}")
    return lines


def _fields(title: str, names: Sequence[str]) -> list[str]:
    """Keys of the section ``names`` of the model that is called ``title``."""
    models = [model for model in _models(BaseModel) if model.__name__ == title]
    for name in names:
        annotations = [m.model_fields[name].annotation for m in models if name in m.model_fields]
        kinds = [kind for a in annotations for kind in (a, *get_args(a))]
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for kind in model.__subclasses__():
        yield kind
        yield from _models(kind)
