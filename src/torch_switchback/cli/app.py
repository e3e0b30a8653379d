"""The commands of ``torch-switchback``, a module each."""

import typer

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
for command in (doctor, recommend, explain, bench, tune, export):
    app.command()(command)


@app.callback()
def torch_switchback() -> None:
    """INT8 training for PyTorch: tools beside the library.

    Start with `doctor`: does it run here? Then `recommend`: is it worth it for your model? `explain` says what runs in
    each layer, `bench` measures layers, `tune` makes products faster on your GPU, `export` writes int8 checkpoints.
    Each has a --help of its own with examples, and --json for programs. They exit with 0 if all went well, 1 if not,
    and 2 if they were called wrongly.
    """
