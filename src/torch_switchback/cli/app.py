"""The commands of ``torch-switchback``, one module each."""

import functools
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import __version__
from .._timing import TRACEBACK
from .bench import bench
from .doctor import doctor
from .explain import explain
from .export import export
from .recommend import recommend
from .tune import tune

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)


def _stops_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that it reports what stops it in one line on stderr."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        try:
            command(**arguments)
        except (typer.Exit, typer.BadParameter):
            raise
        except Exception as error:  # a model, a file or a GPU can raise anything
            if os.getenv(TRACEBACK):
                raise
            reason = " ".join(str(error).split())
            typer.echo(f"torch-switchback {command.__name__}: {type(error).__name__}: {reason}", err=True)
            raise typer.Exit(1) from None

    return run


for command in (doctor, recommend, explain, bench, tune, export):
    app.command()(_stops_in_one_line(command))


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"torch-switchback {__version__}")
        raise typer.Exit


@app.callback()
def torch_switchback(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """INT8 training for PyTorch: tools beside the library.

    Start with `doctor`: does it run here? Then `recommend`: is it worth it for your model? `explain` says what runs in
    each layer, `bench` measures layers, `tune` makes INT8 matmuls faster on your GPU, `export` writes int8 checkpoints.
    Each has a --help of its own with examples, and --json for programs. They exit with 0 if all went well, 1 if not,
    2 if they were called wrongly or miss a package, and 130 after Ctrl-C. An error is one line; with
    TYPER_STANDARD_TRACEBACK=1 in the environment it comes with its traceback.
    """
