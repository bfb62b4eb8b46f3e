"""Metadata of configuration fields: what ``Annotated`` types say beside the type itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def annotations_of(section: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields by name, with their metadata."""
    return get_type_hints(section, include_extras=True)


def metadata(annotation: Any, kind: type[T]) -> T | None:
    """The metadata of class ``kind`` of a type, of a union's members or of a tuple's items."""
    if get_origin(annotation) is Annotated:
        return next((item for item in annotation.__metadata__ if isinstance(item, kind)), None)
    found = (metadata(part, kind) for part in get_args(annotation))
    return next((item for item in found if item is not None), None)


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, type with metadata, and value of every field that is no section itself."""
    annotations = annotations_of(type(section))
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", annotations[field.name], value
