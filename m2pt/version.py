"""The version of the package: of what is installed, or of the checkout that is run from."""

from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "m2pt-triton"


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        setup = ConfigParser()
        setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
        if setup.get("metadata", "name", fallback=None) == DISTRIBUTION:
            return setup["metadata"]["version"]
        return "unknown"


__version__ = _version()
