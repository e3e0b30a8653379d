"""The command ``torch-switchback``. Nothing in the library imports it; typer and rich come with the extra ``cli``."""


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: always; with a message if typer or rich are missing.
    """
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        raise SystemExit(f"torch-switchback needs {error.name}: pip install 'torch-switchback[cli]'") from None
    app()
