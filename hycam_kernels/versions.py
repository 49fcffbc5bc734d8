"""Refusal of versions of other packages that can't work, before anything of them is imported."""

import importlib.metadata
import re


class VersionError(ImportError):
    """An installed package is older than this one needs; the message is one line that says what to install."""


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without trailing zeros and what marks a build or a pre-release: 2.6.0+cpu is (2, 6)."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def require(floors: dict[str, str]) -> None:
    """Refuse what is installed and too old.

    Args:
        floors: package -> the oldest version that works. One that isn't installed is left to its own import.

    Raises:
        VersionError: naming the package, both versions, and what to install.
    """
    for package, oldest in floors.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if release(installed) < release(oldest):
            raise VersionError(
                f"{package} {installed} is installed, {oldest} or later is wanted: pip install '{package}>={oldest}'"
            )
