"""Checks of arguments shared by several functions, and imports of optional packages.

Every message begins with the name of the argument or of the module.
"""

import importlib
import os
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsIndex


def qualified_name(value: Any) -> str:
    """The name of its class, with the module that defines it."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_kind(kind: Any, expected: str, **arguments: Any) -> None:
    """Raise a TypeError for an argument that is not of the expected kind."""
    for name, value in arguments.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {expected}, got {value!r}")


def check_sizes(**sizes: int) -> None:
    """Raise a TypeError for a size that is not an integer, and a ValueError for a negative one."""
    check_kind(SupportsIndex, "an integer", **sizes)
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name}: expected 0 or more, got {size}")


def checked_path(argument: str, path: str | os.PathLike) -> Path:
    """`path` as a Path, or a TypeError."""
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"{argument}: expected a path, got {path!r}") from None


def one_of(argument: str, value: str, allowed: Collection[str]) -> str:
    """`value` if it is allowed; otherwise a ValueError that lists the allowed values and names the nearest."""
    if value not in list(allowed):
        expected = ", ".join(sorted(allowed))
        raise ValueError(f"{argument}: expected one of {expected}; got {value!r}{nearest(value, allowed)}")
    return value


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?", or nothing if no known name is near."""
    matches = get_close_matches(str(name), known, cutoff=0.7)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def check_positive(**settings: int) -> None:
    """Raise a ValueError for a setting that is not a positive integer."""
    for name, value in settings.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_probability(**settings: float) -> None:
    """Raise a ValueError for a setting that is not a number in [0, 1]."""
    for name, value in settings.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a probability in [0, 1], got {value!r}")


def check_not_negative(**settings: float) -> None:
    """Raise a ValueError for a setting that is not a finite number of 0 or more."""
    for name, value in settings.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected 0 or more, got {value!r}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or raise an ImportError that says which extra installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install 'm2pt-triton[{extra}]'") from error
