"""Modules that moved: they answer under their earlier names for one release, as the very same module objects.

A table in a package's `__init__` says which. Patching or caching through either name reaches the same module, and
`python -m EARLIER.NAME` runs it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType


class _MovedLoader(InspectLoader):
    def __init__(self, target: str) -> None:
        self.target = target
        self._own_spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.target)
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put the alias's spec on a module that has run already.
        module.__spec__ = self._own_spec

    def _loader(self) -> InspectLoader | None:
        spec = find_spec(self.target)
        return spec.loader if spec and isinstance(spec.loader, InspectLoader) else None

    def get_code(self, fullname: str) -> CodeType | None:
        return loader.get_code(self.target) if (loader := self._loader()) else None

    def get_source(self, fullname: str) -> str | None:
        return loader.get_source(self.target) if (loader := self._loader()) else None


class _MovedFinder(MetaPathFinder):
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = dict(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        moved_to = self.names.get(fullname)
        if moved_to is None:
            return None
        own = find_spec(moved_to)
        spec = ModuleSpec(fullname, _MovedLoader(moved_to), origin=own.origin if own else None)
        spec.has_location = True  # `python -m` takes __file__ from the origin
        return spec


def keep_earlier_names(names: Mapping[str, str]) -> None:
    """Let `import EARLIER` give the module LATER, for a table {earlier: later} of full names."""
    sys.meta_path.insert(0, _MovedFinder(names))  # Before those of other installations, which may be of earlier files.
