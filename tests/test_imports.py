"""Check what is imported, by whom and when; and what is read without running it."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What takes longer to import than the package itself.
LATER = [
    "triton",
    "typer",
    "rich",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
]


def test_imported_when_it_is_needed():
    """If importing torch alone does not import it."""
    code = "import sys, torch; before = set(sys.modules); import torch_switchback; "
    code += f"print([module for module in {LATER} if module in sys.modules.keys() - before])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


WITHOUT_TRITON = """
import io, sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, torch_switchback as ts
from torch.nn import Linear, ReLU, Sequential
every, int8 = lambda module, fqn: True, ts.SwitchBackConfig(min_tokens=0)
model = ts.convert_to_switchback(Sequential(Linear(8, 16), ReLU(), Linear(16, 4)), config=int8, module_filter_fn=every)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(32, 8)
losses = []
for _ in range(20):
    loss = (model(x) - x[:, :4]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.9 * losses[0], losses
for _ in range(2):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Sequential(Linear(8, 16), ReLU(), Linear(16, 4))
    ts.convert_to_switchback(other, config=int8, module_filter_fn=every)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))
    model[0].prepare_for_eval()
print(ts.__file__)
"""


def test_trains_without_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


# What may import what: the table in docs/architecture.md.

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "torch_switchback"


def layers():
    """Each row's path, and the words of what it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("| path | what | may import |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    return {path.strip().strip("`"): set(re.findall(r"[\w.]+", may_import)) for path, _, may_import in rows}


def layer_of(file):
    parts = file.relative_to(PACKAGE).parts
    return parts[0] + ("/" if len(parts) > 1 else "")


def imports(file):
    """Modules that a file imports, as absolute names, and whether it does so as it is imported itself."""
    module = ("torch_switchback", *file.relative_to(PACKAGE).with_suffix("").parts)
    package = module[:-1]
    late = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        is_late = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        late |= set(ast.walk(node)) if is_late else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *filter(None, [node.module])))
            folder = PACKAGE.joinpath(*name.split(".")[1:])
            for alias in node.names:
                is_module = (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
                yield f"{name}.{alias.name}" if is_module else name, node in late


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_layers_import_what_the_architecture_says(file):
    allowed = layers().get(layer_of(file))
    assert allowed is not None, f"docs/architecture.md does not say what {layer_of(file)} may import"
    own = layer_of(file).rstrip("/").removesuffix(".py")
    inner = {path.rstrip("/").removesuffix(".py") for path in layers()}
    for name, late in imports(file):
        top, _, rest = name.partition(".")
        if top == "torch_switchback":
            layer = rest.partition(".")[0]
            if layer in inner - {own} and "all" not in allowed:
                assert layer in allowed, name
        elif top == "triton":
            assert top in allowed or late, name
        elif "stdlib" in allowed:
            assert top in sys.stdlib_module_names, name
        elif top not in {"torch", *sys.stdlib_module_names}:
            assert top in allowed or late, name


def dependencies():
    """Each module of the package but its __init__, and the modules that it imports, also late or for types alone."""
    names = {}
    for file in FILES:
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(("torch_switchback", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = file
    for module, file in names.items():
        yield module, {name for name, _ in imports(file) if name in names and name != module}


def test_no_circle():
    """TopologicalSorter raises CycleError, which names a circle of any length."""
    list(graphlib.TopologicalSorter(dict(dependencies())).static_order())


@pytest.mark.parametrize("outer", ["distributed", "integrations", "analysis", "cli"])
def test_the_core_imports_nothing_around_it(outer):
    around = tuple(
        f"torch_switchback.{name}" for name in ("distributed", "integrations", "analysis", "cli", "__main__")
    )
    for module, imported in dependencies():
        if not module.startswith(around):
            assert not any(name.startswith(f"torch_switchback.{outer}") for name in imported), module


# Reading a file must not run it.


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("folder", ["src", "examples", "benchmarks"])
def test_checkpoints_are_read_as_tensors_alone(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for function, keywords in calls(ast.parse(file.read_text())):
            name = function.rpartition(".")[2]
            if function == "torch.load":
                assert keywords.get("weights_only") == "True", f"{file}: {function}"
            assert not (name in ("load", "loads", "Unpickler") and "pickle" in function), f"{file}: {function}"
            assert name not in ("read_pickle", "add_safe_globals"), f"{file}: {function}"
            assert keywords.get("allow_pickle", "False") == "False", f"{file}: {function}"


def test_what_would_run_a_file_is_seen():
    tree = ast.parse("torch.load(path)\npickle.load(file)\nnp.load(path, allow_pickle=True)")
    assert list(calls(tree)) == [("torch.load", {}), ("pickle.load", {}), ("np.load", {"allow_pickle": "True"})]


# A user's mistake is told under -O too, which removes assertions.


REFUSALS = """
assert False  # is not run
import torch, test_functional, test_int8_matmul, test_quantize
for dtype in (torch.float64, torch.complex64, torch.int64):
    test_functional.test_refuses_other_dtypes(dtype, "cpu")
    test_quantize.test_only_floats(test_quantize.ts.ops.quantize_rowwise, dtype, "cpu")
test_functional.test_refuses_other_shapes_and_devices("cpu")
test_functional.test_refuses_int8_values_that_do_not_fit("cpu")
test_quantize.test_dequantize_refuses_what_does_not_fit("cpu")
test_int8_matmul.test_refuses_what_does_not_fit("cpu")
"""


def test_refusals_do_not_depend_on_assertions():
    subprocess.run([sys.executable, "-O", "-c", REFUSALS], cwd=ROOT / "tests", check=True)
