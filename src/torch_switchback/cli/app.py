"""The commands of ``torch-switchback``, a module each."""

import typer

from .tune import tune

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(tune)


@app.callback()
def torch_switchback() -> None:
    """INT8 training for PyTorch: tools beside the library."""
