"""Classes by name, each in a module that is imported when the name is asked for, and not before."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import BackendUnavailable, SpecError


@dataclass(frozen=True)
class Registry:
    """`entries` by name: "module:Class", and what to type where a package that it needs is missing.

    `absent` begins the refusal of a name that there is not, `needs` that of one whose packages are not here; both have a place for it.
    """

    entries: Mapping[str, tuple[str, str]]
    absent: str
    needs: str

    def check(self, name: str) -> str:
        """The name itself. Raises SpecError for a name that there is not, with the nearest right one."""
        if name in self.entries:
            return name
        near = difflib.get_close_matches(name, self.entries, n=1)
        hint = f"did you mean {near[0]}?" if near else "there are: " + ", ".join(self.entries)
        raise SpecError(f"{self.absent.format(repr(name))}; {hint}")

    def kind(self, name: str) -> type[Any]:
        """The class. Raises as `check`, and BackendUnavailable with the remedy."""
        target, remedy = self.entries[self.check(name)]
        module, _, attribute = target.partition(":")
        try:
            found: type[Any] = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as exc:
            if (exc.name or "").startswith("trimtab"):
                raise  # our own mistake, not a missing dependency
            raise BackendUnavailable(f"{self.needs.format(name)} {exc.name}:  {remedy}") from exc
        return found

    def settings(self, name: str) -> list[str]:
        """The names of its constructor's settings."""
        return list(inspect.signature(self.kind(name)).parameters)

    def load(self, name: str, settings: Mapping[str, Any] | None = None) -> Any:
        """An object of the class; `settings` by name, such as memory="8g". Raises SpecError for an unknown one or a wrong value, too."""
        from trimtab.spec import refuse_unknown  # here: a list of the names alone needs no pydantic

        given = dict(settings or {})
        refuse_unknown(given, dict.fromkeys(self.settings(name)))
        return self.kind(name)(**given)
