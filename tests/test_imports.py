"""The layout: imports run in one direction, and the lecture files stand alone.

The imports are read from the source, so this also sees those that stand inside functions.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minissl


ROOT = Path(__file__).resolve().parents[1]

# Each layer may import from those below it, and from itself.
LAYERS = ["lecture", "training", "data", "evaluation", "scripts"]
LECTURE = ["transformer.py", "autoencoder.py", "contrastive.py", "tokenizer.py", "optim.py"]

FILES = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("minissl/**/*.py"))
FILES += sorted(ROOT.glob("examples/*.py"))
MODULES = {}                           # {name: file}, such as minissl.data.batches
for path in FILES:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__")
    MODULES[name] = path


def imported_names(path):
    """All that a file imports, as full names: minissl.UserError, torch.nn, math, ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_modules(name):
    """The modules of ours that a module imports, without minissl itself.

    minissl holds UserError, and it imports nothing before load_encoder is used.
    """
    modules = set()
    for imported in imported_names(MODULES[name]):
        parent = imported.rpartition(".")[0]
        if imported in MODULES:                      # from minissl.data import batches
            modules.add(imported)
        elif parent in MODULES and MODULES[parent].name != "__init__.py":
            modules.add(parent)                      # from minissl.data.batches import generator
        elif imported.startswith("minissl."):
            assert imported in ("minissl.UserError", "minissl.load_encoder"), imported
    return modules - {"minissl", name}


def layer_of(name):
    """The number of a module's layer in LAYERS."""
    package, *rest = name.split(".")
    if package != "minissl":
        return LAYERS.index("scripts")
    if len(rest) == 1 and rest[0] not in LAYERS:
        return LAYERS.index("lecture")
    return LAYERS.index(rest[0])


def test_the_files_are_those_of_the_map():
    at_the_top = {path.name for path in ROOT.glob("minissl/*.py")}
    assert at_the_top == {"__init__.py", *LECTURE}
    folders = {path.parent.name for path in ROOT.glob("minissl/*/*.py")}
    assert folders == {"training", "data", "evaluation"}


def test_each_file_is_on_the_map_in_init():
    for name, path in MODULES.items():
        if name.startswith("minissl.") and path.name != "__init__.py":
            assert path.name in minissl.__doc__, name


@pytest.mark.parametrize("name", [name for name in MODULES if name != "minissl"])
def test_imports_run_downwards(name):
    for imported in imported_modules(name):
        assert layer_of(imported) <= layer_of(name), f"{name} imports {imported}"


def test_no_imports_run_in_a_circle():
    """Take away the modules that import no other one, until none is left."""
    waiting = {name: imported_modules(name) for name in MODULES if name != "minissl"}
    while waiting:
        free = {name for name, modules in waiting.items() if not modules & waiting.keys()}
        assert free, f"a circle among {sorted(waiting)}"
        for name in free:
            del waiting[name]


@pytest.mark.parametrize("file", LECTURE)
def test_a_lecture_file_needs_torch_alone(file):
    wanted = "numpy" if file == "tokenizer.py" else "torch"
    packages = {name.split(".")[0] for name in imported_names(ROOT / "minissl" / file)}
    assert wanted in packages
    assert packages - {wanted} <= sys.stdlib_module_names


def test_only_numpy_and_torch_come_from_elsewhere():
    ours = {name.split(".")[0] for name in MODULES} | {path.stem for path in FILES}
    for path in FILES:
        packages = {name.split(".")[0] for name in imported_names(path)}
        assert packages - ours - {"numpy", "torch"} <= sys.stdlib_module_names, path


def run_python(code):
    """Run code in a new Python and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_import_minissl_imports_no_torch():
    code = (
        "import sys, minissl\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)\n"
        "import minissl.tokenizer\n"
        "print('torch' in sys.modules)\n"
    )
    assert run_python(code) == "False False\nFalse\n"


def test_load_encoder_is_imported_when_it_is_used():
    code = (
        "import minissl, sys\n"
        "before = 'minissl.evaluation' in sys.modules\n"
        "function = minissl.load_encoder\n"
        "print(before, 'minissl.evaluation' in sys.modules, function.__module__)\n"
    )
    assert run_python(code) == "False True minissl.evaluation.load\n"
    with pytest.raises(AttributeError, match="has no attribute 'load_decoder'"):
        _ = minissl.load_decoder
