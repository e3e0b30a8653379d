"""Tuning tables: which row a matmul gets, whose table wins, and what is worth measuring."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from torch_switchback.tuning import MatmulConfig, _tables, candidates, matmul_config, matmul_table, user_table_path
from torch_switchback.tuning.search import fastest

CONFIG = MatmulConfig("pointer", 64, 64, 64, 8, 2, 4)
ARCHITECTURES = sorted(name for table in _tables.shipped_tables().values() for name in table.serves)
UNLISTED = {"sm_75", "sm_87", "sm_103", "sm_130", "gfx90a", "gfx950", "gfx1201"} - set(ARCHITECTURES)


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    """An empty cache directory, and no memory of the tables before or after."""
    monkeypatch.setenv("TORCH_SWITCHBACK_CACHE", str(tmp_path))
    matmul_table.cache_clear()
    yield tmp_path
    matmul_table.cache_clear()


def config(block_n: int) -> MatmulConfig:
    return MatmulConfig("pointer", 64, block_n, 64, 8, 2, 4)


def write_rows(architecture: str, **configs: MatmulConfig) -> None:
    """A user's table; rows by name, ``m16_n32_k64``."""
    rows = [_tables.Row(*(int(size[1:]) for size in name.split("_")), c, "test") for name, c in configs.items()]
    _tables.write(user_table_path(architecture), _tables.Table({}, False, tuple(rows)))


def warnings_of(function, *args) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    return [str(warning.message) for warning in caught]


def test_tokens_are_counted_by_power_of_two():
    write_rows("sm_80", m128_n512_k512=config(16), m256_n512_k512=config(32), m1000_n512_k512=config(64))
    assert {matmul_config("sm_80", m, 512, 512) for m in (65, 100, 128)} == {config(16)}
    assert {matmul_config("sm_80", m, 512, 512) for m in (129, 200, 256)} == {config(32)}
    assert {matmul_config("sm_80", m, 512, 512) for m in (513, 1000, 1024)} == {config(64)}


def test_the_nearest_row_is_counted_in_octaves():
    write_rows("sm_80", m1024_n1024_k1024=config(16), m1024_n8192_k1024=config(32), m1024_n1024_k8192=config(64))
    assert matmul_config("sm_80", 1024, 2048, 1024) == config(16)
    assert matmul_config("sm_80", 1024, 4096, 1024) == config(32)
    assert matmul_config("sm_80", 1024, 1024, 3000) == config(64)
    assert isinstance(matmul_config("sm_80", 0, 0, 0), MatmulConfig)


def test_an_inner_dimension_counts_as_matmuls_run_it():
    write_rows("sm_80", m512_n512_k1008=config(16), m512_n512_k1000=config(32))
    assert {matmul_config("sm_80", 512, 512, k) for k in (993, 1000, 1008)} == {config(16)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_listed_architecture_has_a_table_that_it_can_run(architecture):
    assert warnings_of(matmul_table, architecture) == []
    _, table = _tables.shipped_table(architecture)
    assert table.rows
    assert _tables.served(table, architecture).tma or not any(row.config.tma for row in table.rows)


def test_shipped_tables_list_themselves_and_only_hopper_runs_tma():
    for name, table in _tables.shipped_tables().items():
        assert name in table.serves
    assert [name for name in ARCHITECTURES if any(c.tma for _, c in matmul_table(name))] == ["sm_90"]


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *((architecture, "sm_80") for architecture in sorted(UNLISTED) if architecture.startswith("sm_")),
        *((architecture, "gfx942") for architecture in sorted(UNLISTED) if architecture.startswith("gfx")),
    ],
)
def test_an_unlisted_architecture_takes_the_nearest_lower_table_and_says_so_once(architecture, name):
    (message,) = warnings_of(matmul_config, architecture, 1024, 1024, 1024)
    assert architecture in message and f"{name}'s" in message and "torch-switchback tune" in message
    assert warnings_of(matmul_config, architecture, 16, 4096, 4096) == []
    assert matmul_table(architecture) == matmul_table(name)


def test_the_nearest_of_several_lower_tables(monkeypatch):
    row = _tables.Row(1, 1, 1, CONFIG, "test")
    tables = {
        name: _tables.Table({name: _tables.Served(99, False)}, open_, (row,))
        for name, open_ in [("sm_80", True), ("sm_90", False), ("sm_100", True), ("sm_120", True)]
    }
    monkeypatch.setattr(_tables, "shipped_tables", lambda: tables)
    names = {a: _tables.shipped_table(a)[0] for a in ("sm_70", "sm_89", "sm_90", "sm_95", "sm_103", "sm_121")}
    assert names == {
        "sm_70": "sm_80",
        "sm_89": "sm_80",
        "sm_90": "sm_90",
        "sm_95": "sm_80",
        "sm_103": "sm_100",
        "sm_121": "sm_120",
    }


@pytest.mark.parametrize("architecture", ["cpu", "sm_", "90", ""])
def test_no_architecture(architecture):
    with pytest.raises(ValueError, match="architecture must be like"):
        matmul_config(architecture, 1, 1, 1)


def test_the_users_rows_win_over_the_shipped_ones_of_their_shape():
    shipped = dict(matmul_table("sm_90"))
    m, n, k = max(shipped)
    others = set(shipped) - {(m, n, k)}
    matmul_table.cache_clear()
    write_rows("sm_90", **{f"m{m - 1}_n{n}_k{k}": CONFIG})  # m - 1 is counted as m
    assert matmul_config("sm_90", m, n, k) == CONFIG
    assert dict(matmul_table("sm_90")) == {(m - 1, n, k): CONFIG} | {other: shipped[other] for other in others}


def test_an_unlisted_architecture_with_a_users_table_says_nothing():
    write_rows("sm_87", m16_n32_k64=CONFIG)
    assert warnings_of(matmul_table, "sm_87") == []
    assert matmul_config("sm_87", 16, 32, 64) == CONFIG


def a_row(**changes) -> str:
    fields = {"m": 1, "n": 1, "k": 1, "config": {**vars(CONFIG)}, "provenance": "test"}
    return json.dumps({"int8_matmul": [fields | changes]})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ('{"int8_matmul": [', "Expecting value"),
        ("\udcff", "utf-8"),
        ("[]", "no table"),
        ("{}", "int8_matmul"),
        ('{"int8_matmul": [{"m": 1}]}', "no table"),
        ('{"int8_matmul": 3}', "no table"),
        (a_row(m=0), "m must be"),
        (a_row(n="4"), "n must be"),
        (a_row(provenance=None), "provenance"),
        (a_row(config={}), "no table"),
        (a_row(config={**vars(CONFIG), "speed": 1}), "speed"),
        (a_row(config={**vars(CONFIG), "block_m": 96}), "power of two"),
        (a_row(config={**vars(CONFIG), "num_stages": 2.0}), "num_stages"),
        (a_row(config={**vars(CONFIG), "kernel": "cuda"}), "kernel"),
        (a_row(config={**vars(CONFIG), "kernel": "tma"}), "sm_80 runs no rows with tma"),
    ],
)
def test_a_corrupt_users_table_is_named_once_and_not_used(content, reason):
    shipped = matmul_table("sm_80")
    matmul_table.cache_clear()
    path = user_table_path("sm_80")
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    (message,) = warnings_of(matmul_table, "sm_80")
    assert str(path) in message and reason in message
    assert warnings_of(matmul_config, "sm_80", 1, 1, 1) == []
    assert matmul_table("sm_80") == shipped


def test_an_unreadable_users_table():
    user_table_path("sm_80").mkdir()
    (message,) = warnings_of(matmul_table, "sm_80")
    assert str(user_table_path("sm_80")) in message


def test_a_cache_directory_that_is_none_is_no_table(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TORCH_SWITCHBACK_CACHE", str(file))
    assert warnings_of(matmul_table, "sm_80") == []


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"TORCH_SWITCHBACK_CACHE": "a", "XDG_CACHE_HOME": "b"}, "a"),
        ("linux", {"XDG_CACHE_HOME": "b", "LOCALAPPDATA": "c"}, "b/torch_switchback"),
        ("linux", {"HOME": "d"}, "d/.cache/torch_switchback"),
        ("win32", {"XDG_CACHE_HOME": "b", "LOCALAPPDATA": "c"}, "c/torch_switchback"),
    ],
)
def test_where_the_users_table_lies(monkeypatch, platform, variables, folder):
    for name in ("TORCH_SWITCHBACK_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert user_table_path("sm_90") == Path(folder, "sm_90.json")


def test_a_table_is_read_as_it_was_written(tmp_path):
    for table in _tables.shipped_tables().values():
        _tables.write(tmp_path / "folder" / "table.json", table)
        assert _tables.read(tmp_path / "folder" / "table.json") == table
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["table.json"]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "sm_87", "gfx950"])
def test_candidates_fit_shared_memory(architecture, quick):
    table = _tables.shipped_table(architecture)[1]
    limits = _tables.served(table, architecture)
    found = list(candidates.candidates(architecture, quick=quick))
    assert len(found) == len(set(found))
    assert any(c.block_m == 16 for c in found) and any(c.block_m == 128 for c in found)
    for c in found:
        assert limits.tma or not c.tma
        assert candidates.shared_memory(c, out_bytes=4) <= limits.shared_memory_kib * 1024
        assert candidates.shared_memory(c, out_bytes=2) * c.ctas_per_sm <= limits.shared_memory_kib * 1024


def tiles_of(tiles):
    return [(block_m, *rest) for block_m, others in tiles.items() for rest in others]


def test_candidates_of_hopper():
    found = set(candidates.candidates("sm_90"))
    tma = [c for c in found if c.kernel == "tma"]
    assert {(c.block_m, c.block_n, c.block_k) for c in tma} == set(tiles_of(candidates.TMA_TILES))
    assert {c.num_stages for c in tma} == {3, 4, 5}
    assert {c.ctas_per_sm for c in tma} == {1, 2}
    specialized = [c for c in found if c.kernel == "warp_specialized"]
    assert {(c.block_m, c.block_n, c.block_k) for c in specialized} == set(tiles_of(candidates.WARP_SPECIALIZED_TILES))
    assert {c.num_stages for c in specialized} == {3, 4, 5, 6}
    assert {c.group_m for c in found} == {4, 8, 16, 32}
    assert {c.num_warps for c in found} == {4, 8}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("m", [1, 16, 20, 64, 1000, 65536])
def test_candidates_for_some_rows(architecture, m):
    every = set(candidates.candidates(architecture))
    found = list(candidates.candidates(architecture, m=m))
    assert set(found) <= every and len(found) == len(set(found)) and found
    assert all(min(m, 64) <= c.block_m <= max(m, 64) for c in found)
    assert set(candidates.candidates(architecture, m=m, quick=True)) <= every
    assert len(list(candidates.candidates(architecture, m=m, quick=True))) <= len(found)


def test_the_best_are_measured_interleaved():
    tries = [config(16 << i) for i in range(8)]
    order = []

    def clock(c):
        order.append(c)
        return float(c.block_n)

    found = fastest(tries, CONFIG, clock, rounds=3)
    assert found.config == tries[0] and found.milliseconds == 16.0 and found.before == 64.0
    assert len(order[8:]) == 3 * 6
    assert set(order[8:14]) == set(order[14:20]) == set(order[20:26]) == set(tries[:6])


def test_the_current_choice_is_compared_to_the_end_even_if_it_is_slow():
    slow = config(1024)
    found = fastest([config(16 << i) for i in range(6)], slow, lambda c: float(c.block_n), rounds=1)
    assert found.config == config(16) and found.before == 1024.0


@pytest.mark.parametrize(("milliseconds", "kept"), [(1.0, True), (0.99, True), (0.97, False), (1.1, True)])
def test_the_current_choice_is_kept_unless_another_is_two_percent_faster(milliseconds, kept):
    other = config(16)
    found = fastest([other], CONFIG, lambda c: milliseconds if c == other else 1.0, rounds=1)
    assert found.config == (CONFIG if kept else other)


def test_medians_decide():
    times = {CONFIG: iter([1, 1, 1, 1, 1, 1]), config(16): iter([0.1, 0.1, 2, 2, 2, 0.1])}
    assert fastest([config(16)], CONFIG, lambda c: next(times[c]), rounds=5).config == CONFIG


def test_candidates_that_do_not_run_are_counted():
    def clock(c):
        if c != config(16):
            raise RuntimeError("out of shared memory")
        return 1.0

    found = fastest([config(16), config(32)], CONFIG, clock, rounds=1)
    assert (found.config, found.before, found.skipped) == (config(16), None, 2)
    assert "out of shared memory" in found.reason
    with pytest.raises(RuntimeError, match=r"none of 2 configurations ran.*out of shared memory"):
        fastest([config(32)], CONFIG, clock, rounds=1)


def test_looking_up_imports_neither_triton_nor_the_command_line():
    code = (
        "import sys, torch_switchback, torch_switchback.tuning as t; t.matmul_config('sm_90', 1, 1, 1); "
        "print(sorted({'triton', 'typer', 'torch_switchback.cli'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_outputs_that_tma_cannot_store_get_a_row_without_it(architecture: str) -> None:
    for m in (1, 64, 4096, 65536):
        assert not matmul_config(architecture, m, 4096, 4096, tma=False).tma


def test_candidates_for_outputs_that_tma_cannot_store() -> None:
    found = list(candidates.candidates("sm_90", m=4096, tma=False))
    assert found
    assert not any(config.tma for config in found)


def test_a_row_without_the_choice_of_tma_serves_no_output_that_has_it() -> None:
    assert matmul_config("sm_90", 16384, 4088, 4096).tma
    without = matmul_config("sm_90", 16384, 4089, 4096, tma=False)
    assert not without.tma
    assert without.block_m >= 64  # none of the rows for a handful of tokens


def test_no_two_shipped_tables_list_one_architecture():
    assert len(ARCHITECTURES) == len(set(ARCHITECTURES))
