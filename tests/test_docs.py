"""Everything that the documentation shows runs: Python blocks are executed, commands and their flags looked up.

The Python blocks of a page run one after the other in one namespace, in an empty folder, with the names that GIVEN
holds for the page. One that needs what is not here says so in its fence, ```` ```python title="needs a GPU" ````, and
is in NOT_RUN.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("markdown_it", reason="the documentation's tests need markdown-it-py")
pytest.importorskip("typer", reason="the commands need torch-switchback[cli]")

from markdown_it import MarkdownIt
from typer.testing import CliRunner

import torch_switchback

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
# Page and need of every block that is only compiled.
NOT_RUN: set[tuple[str, str]] = set()
# Pages that another test runs, which has what they need.
RUN_ELSEWHERE = dict.fromkeys(("docs/integrations.md", "docs/lora.md"), "tests/integrations/test_docs_integrations.py")
# Pages whose blocks are alternatives, each with what is given anew.
ALTERNATIVES = {"docs/scaling.md"}

pytestmark = pytest.mark.filterwarnings("ignore:grad_weight='int8' stays at high precision")  # examples are small


class Fence(NamedTuple):
    line: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def needs(self) -> str | None:
        """Return what the block needs that is not here, or None."""
        match = re.search(r'title="needs ([^"]+)"', self.info)
        return match and match[1]


class Model(nn.Module):
    """The model of a reader, with layers wide enough to convert, under the names of README.md and scaling.md."""

    def __init__(self) -> None:
        super().__init__()
        mlps = [nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(OrderedDict(mlp=mlp)) for mlp in mlps)
        self.head = nn.Linear(1024, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def a_model() -> dict[str, Any]:
    return {"model": Model(), "data": torch.randn(2, 4, 1024), "sample_input": torch.randn(4, 1024)}


def a_process_group() -> dict[str, Any]:
    """A model on a mesh of one process."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = Model()
    return {name: getattr(torch_switchback, name) for name in torch_switchback.__all__} | {
        "DistributedDataParallel": DistributedDataParallel,
        "fully_shard": fully_shard,
        "mesh": dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor")),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters()),
        "parallelize_module": parallelize_module,
        "plan": {"blocks.*.mlp.0": ColwiseParallel(), "blocks.*.mlp.2": RowwiseParallel()},
        "policy": MixedPrecisionPolicy(),
    }


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {"README.md": a_model, "docs/scaling.md": a_process_group}


def tokens(page: str) -> Iterator[Any]:
    """Yield the tokens of a page of Markdown, with those inside of its paragraphs and tables."""
    for token in MarkdownIt().enable("table").parse(page):
        yield token
        yield from token.children or ()


def fences(page: str) -> list[Fence]:
    return [Fence(token.map[0] + 1, token.info, token.content) for token in tokens(page) if token.type == "fence"]


def run(page: str, given: Callable[[], dict[str, Any]] = dict, *, alternatives: bool = False, name: str = "page"):
    """Execute a page's Python blocks."""
    names = given()
    for fence in fences(page):
        if fence.language == "python":
            code = compile("\n" * fence.line + fence.text, name, "exec")  # errors name the page's line
            if alternatives:
                names = given()
            if fence.needs is None:
                exec(code, names)


def commands(page: str) -> Iterator[list[str]]:
    """The words of each line of a block without a language or in sh, and of each code span."""
    for token in tokens(page):
        if token.type == "code_inline":
            lines = [token.content]
        elif token.type == "fence" and token.info in ("", "sh", "console"):
            lines = token.content.replace("\\\n", " ").splitlines()
        else:
            continue
        for line in lines:
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # no command: an apostrophe
                continue
            if words:
                yield words


def wrong_with(words: list[str]) -> str:
    """Why a command would not run; "" if it would, or is not ours."""
    program, *rest = words
    program = program.rpartition("/")[2] if program.startswith(".venv/") else program
    match program, rest:
        case "make", [*_]:
            targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            return missing("make's targets", (word for word in rest if "=" not in word), targets)
        case "pip", ["install", *_]:
            asked = re.findall(r"(?:torch-switchback|\.)\[([\w,-]+)\]", " ".join(rest))
            extras = re.findall(r"^([\w-]+) = \[", extras_table(), re.MULTILINE)
            return missing("extras", (extra for group in asked for extra in group.split(",")), set(extras))
        case "torch-switchback", [subcommand, *flags] if re.fullmatch(r"[a-z]+", subcommand):
            return missing(f"{subcommand}'s flags", ["--help", *flags_of(flags)], words_of_help(subcommand))
        case "torch-switchback", flags:
            return missing("its flags", flags_of(flags), words_of_help())
        case "python", ["-m", module, *_] if module.startswith("torch_switchback"):
            return "" if is_program(module) else f"{module} is no program"
        case (("python" | "torchrun"), [*_]):
            script = next((word for word in rest if word.endswith(".py")), "")
            if not script.startswith(("benchmarks/", "examples/", "tests/")) or "$" in script:
                return ""
            flags = flags_of(rest[rest.index(script) :])
            return missing(f"{script}'s flags", flags, words_of_script(script)) if flags else is_there(script)
        case "pytest", [*_]:
            return "".join(is_there(word) for word in rest if word.startswith("tests"))
    return ""


def flags_of(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def missing(what: str, wanted: Any, known: set[str]) -> str:
    unknown = [word for word in wanted if word not in known]
    return f"not among {what}: {', '.join(unknown)}" if unknown else ""


def is_there(path: str) -> str:
    return "" if (ROOT / path).exists() else f"{path} does not exist"


def is_program(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return is_package and importlib.util.find_spec(f"{module}.__main__") is not None


@cache
def extras_table() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]


@cache
def words_of_help(*subcommand: str) -> set[str]:
    from torch_switchback.cli.app import app

    wide = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1"}
    finished = CliRunner().invoke(app, [*subcommand, "--help"], env=wide)
    return set(re.findall(r"--[\w-]+", finished.output)) if finished.exit_code == 0 else set()


@cache
def words_of_script(script: str) -> set[str]:
    pytest.importorskip("matplotlib", reason="the scripts need torch-switchback[demo]")
    finished = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    return set(re.findall(r"--[\w-]+", finished.stdout))


@pytest.fixture
def no_process_group_after():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("only_where_it_wins")  # as for the reader
@pytest.mark.parametrize(
    "name", [name for name, page in PAGES.items() if "```python" in page and name not in RUN_ELSEWHERE]
)
def test_python_blocks_run(name, tmp_path, monkeypatch, no_process_group_after):
    monkeypatch.chdir(tmp_path)
    run(PAGES[name], GIVEN.get(name, dict), alternatives=name in ALTERNATIVES, name=name)


def test_blocks_that_are_not_run_are_few_and_listed():
    assert {(name, fence.needs) for name, page in PAGES.items() for fence in fences(page) if fence.needs} == NOT_RUN


@pytest.mark.parametrize(("name", "test"), RUN_ELSEWHERE.items())
def test_pages_that_are_run_elsewhere_are(name, test):
    assert name not in PAGES or name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_their_flags_exist(name):
    wrong = {" ".join(words): wrong_with(words) for words in commands(PAGES[name])}
    assert {command: reason for command, reason in wrong.items() if reason} == {}


def public() -> dict[str, Any]:
    """The package's names, and those of its modules that users import from."""
    from torch_switchback import distributed, nn, ops
    from torch_switchback.analysis import explanation, monitor

    modules = {module: module.__all__ for module in (torch_switchback, ops, distributed)}
    modules[explanation] = ["FallbackError"]  # which explain raises
    modules[nn] = [name for name in vars(nn) if name.startswith("SwitchBackLinear")]
    modules[monitor] = [n for n, each in vars(monitor).items() if getattr(each, "__module__", "") == monitor.__name__]
    return {name: getattr(module, name) for module, names in modules.items() for name in names if name[0] != "_"}


def result_types(hints: dict[str, Any]) -> Iterator[type]:
    """The dataclasses among some annotations, and those of their fields."""
    for hint in hints.values():
        for each in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(each) and isinstance(each, type):
                yield each
                yield from result_types(get_type_hints(each))


def functions() -> list[Callable[..., Any]]:
    return [each for each in public().values() if inspect.isfunction(each)]


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: torch_switchback\.(?:.*\.)?(\w+)$", PAGES["docs/reference.md"], re.MULTILINE)
    returned = [{"return": get_type_hints(function)["return"]} for function in functions()]
    results = {each.__name__ for hints in returned for each in result_types(hints)}
    assert sorted(shown) == sorted(public().keys() | results | names_of_integrations())


def names_of_integrations() -> set[str]:
    """The names that pages import from the bridges or mention. The bridges themselves import other libraries."""
    folder = ROOT / "src/torch_switchback/integrations"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("[a-z]*.py"))]
    defined = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    pages = " ".join(page for name, page in PAGES.items() if name != "docs/reference.md")
    return {name for name in defined if name[0] != "_" and re.search(rf"\b{name}\b", pages)}


def test_docstrings_are_complete_and_refer_to_what_is_public():
    for function in functions():
        documentation = inspect.getdoc(function) or ""
        assert "Args:" in documentation or not inspect.signature(function).parameters, function
        assert "Returns:" in documentation or get_type_hints(function)["return"] is type(None), function
        referred = set(re.findall(r":(?:class|data|func):`(?:torch_switchback\.)?([\w.]+)`", documentation))
        assert referred <= public().keys(), function


def absent_tests(page: str) -> list[str]:
    """Return the linked tests of a page in docs/ that their file does not define."""
    links = re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", page)
    assert links
    sources = {file: (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).exists() else "" for _, file in links}
    return [name for name, file in links if not re.search(rf"^def {name}\(", sources[file], re.MULTILINE)]


def test_the_tests_of_every_guarantee_exist():
    page = PAGES["docs/reliability.md"]
    assert absent_tests(page) == []
    items = re.findall(r"^- .*(?:\n  .*)*", page, re.MULTILINE)
    assert items and [item for item in items if "](../tests/" not in item] == []


# That the tests above can fail.


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```python\nassert False\n```", AssertionError),
        ("- a list\n\n  ```python\n  nothing\n  ```", NameError),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```", AssertionError),
        ('```python title="needs a GPU"\nx =\n```', SyntaxError),
    ],
)
def test_a_wrong_block_fails(page, error):
    with pytest.raises(error):
        run(page)


def test_blocks_share_names_and_errors_have_the_pages_lines():
    run('```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n\n```python title="needs a GPU"\nnothing\n```')
    with pytest.raises(ZeroDivisionError) as caught:
        run("# title\n\n```python\n\n1 / 0\n```")
    assert caught.traceback[-1].lineno + 1 == 5


@pytest.mark.parametrize("link", ["[test_nothing](../tests/test_docs.py)", "[test_docs](../tests/nothing.py)"])
def test_an_absent_test_is_found(link):
    assert absent_tests(f"| a guarantee | {link} |")


@pytest.mark.parametrize(
    "page",
    [
        "```\nmake nothing\n```",
        "`make nothing`",
        "| a |\n|---|\n| `torch-switchback nothing` |",
        "```sh\n$ torch-switchback tune --nothing  # why not\n```",
        "```\npython benchmarks/scaling.py \\\n    --nothing 3\n```",
        "```\ntorchrun --nproc-per-node 2 examples/nothing.py\n```",
        "```\n.venv/bin/pip install 'torch-switchback[nothing]'\n```",
        "`python -m torch_switchback.analysis.monitor`",
        "`pytest tests/nothing.py`",
    ],
)
def test_a_wrong_command_is_found(page):
    assert any(map(wrong_with, commands(page)))
