"""What is installed: versions, what fastmae needs of them, and which of its extras are complete."""

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from fastmae import __version__

OURS = "fastmae"
SHOWN = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "pillow", "simplejpeg", "pyarrow", "safetensors")
FOR_DEVELOPERS = "dev"


def versions() -> dict[str, str | None]:
    """Version of fastmae and of the packages that matter most; None for one that is not installed."""
    return {OURS: __version__} | {name: version_of(name) for name in SHOWN}


def version_of(package: str) -> str | None:
    """The version that is installed; None if none is."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unmet(package: str = OURS, extra: str = "") -> list[Requirement]:
    """What a package requires and is not there, or is there in another version.

    Args:
        package: an installed one; of any other, nothing is known.
        extra: look at what this extra adds; '': at what is needed in any case.
    """
    return [requirement for requirement in _requirements(package, extra) if not _is_met(requirement)]


def extras() -> dict[str, list[Requirement]]:
    """Each of fastmae's extras, with what it lacks. Empty where fastmae runs without having been installed."""
    try:
        names = metadata.metadata(OURS).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return {}
    return {name: unmet(extra=name) for name in sorted(names) if name != FOR_DEVELOPERS}


def _requirements(package: str, extra: str) -> Iterator[Requirement]:
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        in_any_case = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if (not extra and in_any_case) or (
            extra and not in_any_case and requirement.marker and requirement.marker.evaluate({"extra": extra})
        ):
            yield requirement


def _is_met(requirement: Requirement) -> bool:
    version = version_of(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)
