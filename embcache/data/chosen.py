"""What a user says of a dataset's own table: names of columns, and spellings of classes that are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from embcache.config import DatasetRef
from embcache.errors import UsageError

ROLES = ("path", "label", "group", "split", "id")


@dataclass(frozen=True)
class Columns:
    """How a dataset's own table is to be read: names of columns, and spellings of classes that are one."""

    path: str = ""
    label: str = ""
    group: str = ""
    split: str = ""
    id: str = ""
    merge_class: tuple[str, ...] = ()  # ``A+b=NAME`` for classes that differ only in letter case

    @classmethod
    def of(cls, given: Columns | Mapping[str, Any] | None) -> Columns:
        """From a mapping such as ``{"group": "Patient ID"}``."""
        if isinstance(given, Columns):
            return given
        unknown = [key for key in given or () if key not in {f.name for f in fields(cls)}]
        if unknown:
            raise UsageError(
                f"there is no column for {unknown[0]!r}",
                expected=", ".join(f.name for f in fields(cls)),
                where="columns",
            )
        texts: dict[str, Any] = {key: str(value) for key, value in (given or {}).items()}
        return cls(**texts | {"merge_class": tuple((given or {}).get("merge_class", ()))})

    @classmethod
    def of_ref(cls, ref: DatasetRef) -> Columns:
        """The columns that a reference names."""
        return cls(
            ref.path_column, ref.label_column, ref.group_column, ref.split_column, ref.id_column, ref.merge_class
        )

    def over(self, before: Columns) -> Columns:
        """These columns, and where none is named those of ``before``."""
        merged = {f.name: getattr(self, f.name) or getattr(before, f.name) for f in fields(self)}
        return replace(self, **{**merged, "merge_class": tuple(dict.fromkeys(before.merge_class + self.merge_class))})

    def named(self) -> dict[str, str]:
        """The column of each role that has one."""
        return {role: name for role in ROLES if (name := getattr(self, role))}

    def words(self) -> list[str]:
        """The options that say the same on the command line, as words of a shell."""
        named = [word for role, name in self.named().items() for word in (f"--{role}-column", name)]
        return named + [word for text in self.merge_class for word in ("--merge-class", text)]
