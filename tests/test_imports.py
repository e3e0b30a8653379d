"""What importing the package must not import: it takes longer than the package itself."""

import subprocess
import sys

import pytest

LATER = [
    "triton",
    "typer",
    "rich",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
]


@pytest.mark.parametrize("module", LATER)
def test_imported_when_it_is_needed(module):
    """If importing torch alone does not import it."""
    code = f"import sys, torch; before = {module!r} in sys.modules; import torch_switchback; "
    code += f"print(before or {module!r} not in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
