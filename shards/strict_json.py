"""JSON read strictly: every value is asked for by its name and type, and anything else is a
ValueError that names it.

Whoever signs a manifest may write anything into it, so nothing of one is used before it went
through here.
"""

from collections.abc import Iterator
from typing import Any

MAX_WHOLE = 2**62  # no file, row or sum of squares is as large


class JsonObject:
    """One object of a JSON text.

    where: its place, for messages, in the object `inside` if there is one. A large set's manifest
    has tens of thousands of objects, and their places are put together only for a message.
    """

    __slots__ = ("_inside", "_value", "_where")

    def __init__(self, value: Any, where: str, inside: "JsonObject | None" = None) -> None:
        self._where = where
        self._inside = inside
        if type(value) is not dict:
            raise ValueError(f"{self} is not an object")
        self._value: dict[str, Any] = value

    def __str__(self) -> str:
        """Its place in the text."""
        return self._where if self._inside is None else f"{self._inside}.{self._where}"

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def keys(self) -> list[str]:
        return list(self._value)

    def only(self, *known: str) -> None:
        """Refuse keys that a later version may have added: their meaning is not known here."""
        unknown = self._value.keys() - known
        if unknown:
            raise ValueError(f"{self} has {min(unknown)}, which is not known")

    def text(self, key: str) -> str:
        return self._of_type(key, str)

    def text_or_none(self, key: str) -> str | None:
        return None if self._get(key) is None else self.text(key)

    def whole(self, key: str) -> int:
        """A whole number from 0."""
        return self._whole(self._get(key), key)

    def whole_or_none(self, key: str) -> int | None:
        return None if self._get(key) is None else self.whole(key)

    def number(self, key: str) -> float:
        value = self._get(key)
        if type(value) in (int, float):
            return self._float(value, key)
        return self._of_type(key, float)

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._list(key)
        if any(type(value) is not str for value in values):
            raise ValueError(f"{self}.{key} holds something that is no text")
        return tuple(values)

    def wholes(self, key: str) -> tuple[int, ...]:
        values = self._list(key)
        return tuple([self._whole(value, key) for value in values])

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self._list(key)
        return tuple([self._float(value, key) for value in values])

    def table(self, key: str) -> tuple[tuple[int, ...], ...]:
        """A list of lists of whole numbers."""
        rows = self._list(key)
        if not {type(row) for row in rows} <= {list}:
            raise ValueError(f"{self}.{key} holds something that is no list")
        return tuple([tuple([self._whole(value, key) for value in row]) for row in rows])

    def object(self, key: str) -> "JsonObject":
        return JsonObject(self._get(key), key, self)

    def object_or_none(self, key: str) -> "JsonObject | None":
        return None if self._get(key) is None else self.object(key)

    def objects(self, key: str) -> "list[JsonObject]":
        """A list of objects."""
        values = self._list(key)
        return [JsonObject(value, f"{key}[{k}]", self) for k, value in enumerate(values)]

    def items(self) -> "Iterator[tuple[str, JsonObject]]":
        """Where every value is an object: each of them by its key."""
        for key in self._value:
            yield key, self.object(key)

    def _get(self, key: str) -> Any:
        if key not in self._value:
            raise ValueError(f"{self} has no {key}")
        return self._value[key]

    def _of_type(self, key: str, kind: type) -> Any:
        value = self._get(key)
        if type(value) is not kind:
            raise ValueError(f"{self}.{key} has the wrong type")
        return value

    def _list(self, key: str) -> list[Any]:
        return self._of_type(key, list)

    def _whole(self, value: Any, key: str) -> int:
        if type(value) is not int or not 0 <= value <= MAX_WHOLE:
            raise ValueError(f"{self}.{key} has the wrong type")
        return value

    def _float(self, value: Any, key: str) -> float:
        """Neither NaN nor infinite, nor beyond what anything here can be."""
        if type(value) not in (int, float) or not abs(value) <= MAX_WHOLE:
            raise ValueError(f"{self}.{key} holds something that is no number")
        return float(value)
