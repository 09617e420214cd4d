"""The version of the package: that of the installation, or of the checkout it runs from."""

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
