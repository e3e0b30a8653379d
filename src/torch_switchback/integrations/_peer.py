"""Import the library that an integration is for."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def peer(package: str, requirement: str) -> Iterator[None]:
    """Turn the ImportError of a missing package into one that gives the pip line for a requirement."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"torch_switchback.integrations.{package} needs {requirement}: {error}\n    pip install '{requirement}'",
            name=error.name,
        ) from error
