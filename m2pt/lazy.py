"""Lazy imports: a package's names are imported on first use, so that the command line starts at once."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def attach(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and the `__dir__` of a package (PEP 562). Its public submodules are attributes as well.

    Args:
        package: its `__name__`.
        modules: name -> the submodule that defines it.
    """
    namespace = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:
        if name in modules:
            namespace[name] = getattr(import_module(f"{package}.{modules[name]}"), name)
            return namespace[name]
        if not name.startswith("_") and find_spec(f"{package}.{name}"):
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])

    def __dir__() -> list[str]:
        return sorted({*namespace, *modules})

    return __getattr__, __dir__
