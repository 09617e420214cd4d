"""Writes values as TOML, which Python's own module only reads."""

import json
import re
from typing import Any


def toml_value(value: Any) -> str:
    """A value on one line, tables inline; infinities and NaN are as in TOML.

    Raises:
        TypeError: it is not a string, boolean, number, list or dict by strings, or holds anything else.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        entries = ", ".join(f"{_key(key)} = {toml_value(entry)}" for key, entry in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    raise TypeError(f"expected a string, boolean, number, list or table, got {value!r}")


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # JSON escapes the rest that TOML does not allow
