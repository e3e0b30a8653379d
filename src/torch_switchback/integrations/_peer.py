"""How a bridge imports the library that it is for."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def peer(package: str, requirement: str) -> Iterator[None]:
    """Inside it, a missing package becomes an error that says how to install it.

    Args:
        package: the import name of the library.
        requirement: what pip takes, with the versions that the bridge is written for.

    Raises:
        ImportError: package, or a part of it that the bridge needs, is not there.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"torch_switchback.integrations.{package} needs {requirement}: {error}\n    pip install '{requirement}'",
            name=error.name,
        ) from error
