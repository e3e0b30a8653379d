"""``torch-switchback tune`` from its options to the table, with a clock that needs no GPU."""

import builtins
import json
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
from typer.testing import CliRunner

from torch_switchback import cli, tuning
from torch_switchback.cli import tune
from torch_switchback.cli.app import app
from torch_switchback.tuning import matmul_config, matmul_table, user_table_path

SHAPES = ["1024,256,512", "16,256,512", "4096,1024,1024"]  # TOKENS,IN,OUT
VERSIONS = {"gpu": "Fake GPU", "driver": "1.2", "torch": "2.13.0", "triton": "3.9.0"}


def milliseconds(config) -> float:
    """The fastest of all has 256 columns, group height 4 and the fewest stages."""
    return 1 + abs(config.block_n - 256) / 256 + config.group_m / 100 + config.num_stages / 1000


class FakeGpu:
    architecture = "sm_80"

    def __init__(self):
        self.versions = dict(VERSIONS)
        self.measured = []
        self.interrupt_at = self.break_at = None
        self.cannot_run = lambda config: False

    def clock(self, m, n, k):
        if (m, n, k) == self.interrupt_at:
            raise KeyboardInterrupt
        if (m, n, k) == self.break_at:
            raise torch.OutOfMemoryError("out of memory")
        self.measured.append((m, n, k))

        def clock(config):
            if self.cannot_run(config):
                raise RuntimeError("no such tile")
            return milliseconds(config)

        return clock


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(tune, "Gpu", lambda: fake)
    return fake


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_SWITCHBACK_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    forget()
    yield tmp_path
    forget()


def forget():
    """Forget what a new process would not know."""
    matmul_table.cache_clear()


def run(*arguments, shapes=SHAPES, code=0):
    shapes = [part for shape in shapes for part in ("--shape", shape)]
    result = CliRunner().invoke(app, ["tune", "--rounds", "2", *shapes, *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def rows(path):
    return {(row["m"], row["n"], row["k"]): row for row in json.loads(path.read_text())["int8_matmul"]}


def test_the_table_is_written_and_wins(fake, folder):
    before = matmul_config("sm_80", 1024, 512, 256)
    output = run()
    written = rows(user_table_path("sm_80"))
    assert list(written) == fake.measured == [(1024, 512, 256), (16, 512, 256), (4096, 1024, 1024)]
    row = written[1024, 512, 256]
    assert VERSIONS.items() <= row["provenance"].items()
    assert set(row["provenance"]) == {*VERSIONS, "script", "date", "tflops"}
    forget()
    after = matmul_config("sm_80", 1024, 512, 256)
    assert after != before and (after.block_n, after.group_m, after.num_stages) == (256, 4, 2)
    assert row["provenance"]["tflops"] == pytest.approx(2 * 1024 * 512 * 256 / milliseconds(after) / 1e9, rel=1e-3)
    assert [file.name for file in folder.iterdir()] == ["sm_80.json"]
    assert "3 of 3 shapes changed" in output


def test_what_changed(fake):
    before = matmul_config("sm_80", 1024, 512, 256)
    (line,) = [line for line in run().splitlines() if line.strip().startswith("1024 × 512 × 256")]
    after = rows(user_table_path("sm_80"))[1024, 512, 256]
    flops = 2 * 1024 * 512 * 256 / 1e9
    assert tune._short(before) in line and "×256×64 g4 s2" in line
    assert f"{flops / milliseconds(before):,.1f}" in line and f"{after['provenance']['tflops']:,.1f}" in line
    assert f"{milliseconds(before) / milliseconds(tuning.MatmulConfig(**after['config'])) - 1:+.0%}"[:3] in line
    forget()
    output = run("--fresh")
    assert output.count("kept") == 3 and "0 of 3 shapes changed" in output


def test_a_second_run_measures_nothing_again(fake):
    run()
    forget()
    output = run()
    assert len(fake.measured) == 3
    assert "0 of 3 shapes to measure" in output and "--fresh" in output


@pytest.mark.parametrize("changed", ["gpu", "driver", "torch", "triton"])
def test_another_gpu_or_version_is_measured_again(fake, changed):
    run()
    fake.versions[changed] = "another"
    run()
    assert len(fake.measured) == 6


def test_quick_rows_do_not_stand_for_thorough_ones(fake):
    run("--quick")
    run()
    assert len(fake.measured) == 6


def test_an_interrupted_run_goes_on(fake, folder):
    fake.interrupt_at = (4096, 1024, 1024)
    output = run(code=130)
    assert "Stopped" in output and "2 of 2 shapes changed" in output
    assert list(rows(user_table_path("sm_80"))) == [(1024, 512, 256), (16, 512, 256)]
    fake.interrupt_at = None
    forget()
    output = run()
    assert fake.measured == [(1024, 512, 256), (16, 512, 256), (4096, 1024, 1024)]
    assert "1 of 3 shapes to measure" in output and "of 1 shapes changed" in output
    assert len(rows(user_table_path("sm_80"))) == 3
    assert [file.name for file in folder.iterdir()] == ["sm_80.json"]


@pytest.mark.parametrize("spoil", ["versions", "--fresh"])
def test_an_interrupted_run_that_cannot_go_on_starts_again(fake, folder, spoil):
    fake.interrupt_at = (16, 512, 256)
    run(code=130)
    fake.interrupt_at = None
    if spoil == "versions":
        fake.versions["triton"] = "4"
    run(*[spoil] * (spoil == "--fresh"))
    assert fake.measured.count((1024, 512, 256)) == 2
    assert len(rows(user_table_path("sm_80"))) == 3


def test_other_rows_of_the_table_stay(fake):
    run(shapes=SHAPES[:1])
    run(shapes=SHAPES[1:])
    assert len(rows(user_table_path("sm_80"))) == 3


def test_a_corrupt_table_is_replaced(fake):
    user_table_path("sm_80").write_text("{")
    with pytest.warns(UserWarning, match="does not use the tuning table"):
        output = run()
    assert "will be replaced" in output
    assert len(rows(user_table_path("sm_80"))) == 3


def test_output_elsewhere_keeps_what_the_table_says_of_itself(fake, tmp_path):
    shipped = tuning._tables.shipped_tables()["sm_80"]
    path = tmp_path / "tables" / "sm_80.json"
    tuning._tables.write(path, shipped)
    run("--output", str(path))
    table = tuning._tables.read(path)
    assert table.serves == shipped.serves and table.serves_unlisted
    assert table.rows[: len(shipped.rows)] == shipped.rows and len(table.rows) == len(shipped.rows) + 3
    assert not user_table_path("sm_80").exists()


def test_a_new_table_says_whom_it_serves(fake):
    run(shapes=SHAPES[:1])
    table = tuning._tables.read(user_table_path("sm_80"))
    assert table.serves == {"sm_80": tuning._tables.Served(163, False)} and not table.serves_unlisted


def test_candidates_that_do_not_run_are_counted(fake):
    fake.cannot_run = lambda config: config.block_n == 256
    assert "candidates did not run, as RuntimeError: no such tile" in run(shapes=SHAPES[:1])
    assert rows(user_table_path("sm_80"))[1024, 512, 256]["config"]["block_n"] == 128


def test_shapes_are_measured_as_matmuls_run_them(fake):
    assert "1 of 1 shapes changed" in run(shapes=["512,1000,512", "512,1001,512"])
    assert list(rows(user_table_path("sm_80"))) == [(512, 512, 1008)]


def test_a_shape_that_cannot_be_measured_is_left_out(fake):
    fake.break_at = (16, 512, 256)
    assert "16 × 512 × 256 is left out: OutOfMemoryError: out of memory" in run()
    assert list(rows(user_table_path("sm_80"))) == [(1024, 512, 256), (4096, 1024, 1024)]


def test_nothing_runs(fake):
    fake.cannot_run = lambda config: True
    assert "configurations ran" in run(code=1)
    assert not user_table_path("sm_80").exists()


def test_the_default_shapes(fake):
    fake.architecture = "sm_90"
    run("--quick", shapes=())
    assert len(fake.measured) == len(set(fake.measured)) == 25
    assert {(65536, 5120, 1280), (16384, 4096, 14336), (1, 14336, 4096)} <= set(fake.measured)


@pytest.mark.parametrize("shape", ["1,2", "1,2,3,4", "0,1,2", "-1,2,3", "a,b,c", ""])
def test_shapes_that_are_none(fake, shape):
    assert "'--shape': must be TOKENS,IN,OUT, three positive integers" in run(shapes=[shape], code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    assert "sees no CUDA GPU" in run(code=1)


def test_help_teaches():
    output = CliRunner().invoke(app, ["tune", "--help"]).output
    for word in ("--shape", "--quick", "--output", "--rounds", "--fresh", "Ctrl-C", "TORCH_SWITCHBACK_CACHE"):
        assert word in output
    assert "tune" in CliRunner().invoke(app, ["--help"]).output


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_typer_or_rich(monkeypatch, missing):
    def no_import(name, *args, **kwargs):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_import)
    for name in ("app", "tune"):
        monkeypatch.delitem(sys.modules, f"torch_switchback.cli.{name}")
        monkeypatch.delattr(cli, name)
    with pytest.raises(SystemExit, match=rf"needs {missing}: pip install .* in a checkout pip install '\.\[cli\]'"):
        cli.main()


def test_the_order_of_a_shape_is_that_of_bench():
    """``bench`` and ``tune`` took their numbers in two orders."""
    for command in ("bench", "tune"):
        assert "TOKENS,IN,OUT" in CliRunner().invoke(app, [command, "--help"]).output


def test_json_alone_on_stdout(fake):
    result = CliRunner().invoke(app, ["tune", "--rounds", "2", "--shape", SHAPES[0], "--json"])
    (done,) = json.loads(result.stdout)
    assert (done["row"]["m"], done["row"]["n"], done["row"]["k"]) == (1024, 512, 256)
    assert done["row"]["config"]["block_n"] == 256 and done["before"]["kernel"]
    assert "written to" in result.stderr
    forget()
    again = CliRunner().invoke(app, ["tune", "--rounds", "2", "--shape", SHAPES[0], "--json"])
    assert json.loads(again.stdout) == []
