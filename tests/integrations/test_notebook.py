"""The notebook opens with outputs, and runs again to the same ones."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "switchback.ipynb"


def printed(notebook):
    """Return what each code cell printed; for a picture, that there was one."""
    return [
        [output.get("text") or sorted(output["data"]) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_notebook_runs_and_holds_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    saved = printed(notebook)
    assert sum(map(len, saved)) == 6
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    again = printed(notebook)
    for index in (1, 3, 5, 6):  # the models, the picture, the same bits
        assert again[index] == saved[index]
    assert len(again[2]) == len(again[4]) == 1
