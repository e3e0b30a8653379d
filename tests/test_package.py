"""The wheel: what is in it, and that it works where it alone is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from test_imports import WITHOUT_TRITON

pytest.importorskip("hatchling", reason="needs torch-switchback[test]")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_contents(wheel):
    """The package's sources and data, its license, nothing else."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = (file for file in (ROOT / "src").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert names == {file.relative_to(ROOT / "src").as_posix() for file in sources}
    assert all(name.endswith((".py", ".json", "py.typed")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_installed_alone_it_trains_without_triton(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "torch_switchback" / "__init__.py")
