"""The command ``torch-switchback``. Nothing in the library imports it; typer and rich come with the extra ``cli``."""


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: always; with a message if typer or rich is missing.
    """
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        hint = "pip install rich safetensors typer, or in a checkout pip install '.[cli]'"
        raise SystemExit(f"torch-switchback: this needs {error.name}: {hint}") from None
    app(prog_name="torch-switchback")
