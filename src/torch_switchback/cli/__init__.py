"""The command ``torch-switchback``. Nothing in the library imports it; typer and rich come with the extra ``cli``."""

import warnings


def main() -> None:
    """Run the command line. Warnings are lines on stderr, without the place in the code that they come from.

    Raises:
        SystemExit: always; with a message if typer or rich is missing.
    """
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        hint = "pip install numpy rich safetensors typer, or in a checkout pip install '.[cli]'"
        raise SystemExit(f"torch-switchback: this needs {error.name}: {hint}") from None
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    app(prog_name="torch-switchback")
