"""The exercise of planted_faults.py can be given, and the list fits the present code."""

import ast
import filecmp
import sys

import planted_faults
import pytest
from planted_faults import FAULTS, ROOT, Edit, Fault, change, copy_project


NAMES = [fault.name for fault in FAULTS]

SOURCE = """
class Loss:
    def forward(self, x, target):
        # ‖x − y‖², or so
        difference = (x -     target)  # names and blanks as you like
        return difference ** 2
"""


def planted(fault):
    """{file: (source, source with the fault)} of the files that a fault changes."""
    sources = {}
    for edit in fault.edits:
        right = (ROOT / edit.file).read_text(encoding="utf-8")
        _, wrong = sources.get(edit.file, (right, right))
        sources[edit.file] = right, change(wrong, edit)
    return sources


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_a_fault_changes_what_the_code_means(fault):
    for right, wrong in planted(fault).values():
        assert ast.dump(ast.parse(right)) != ast.dump(ast.parse(wrong))


def names_of(source, context):
    """The names that a source reads (ast.Load) or sets (ast.Store)."""
    nodes = ast.walk(ast.parse(source))
    return {node.id for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_a_fault_is_no_name_error(fault):
    for right, wrong in planted(fault).values():
        new_names = names_of(wrong, ast.Load) - names_of(right, ast.Load)
        assert new_names <= names_of(wrong, ast.Store)


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_the_test_that_should_see_it_exists(fault):
    file, name = fault.test.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert name in names


def test_an_edit_follows_other_names_and_another_layout():
    edit = Edit("loss.py", "Loss.forward", right="a - b", wrong="b - a")
    assert change(SOURCE, edit) == SOURCE.replace("x -     target", "target - x")


def test_an_edit_of_several_lines_keeps_the_indent():
    edit = Edit("loss.py", "Loss.forward", right="return difference**2", wrong="""
        square = difference**2
        return square""")
    assert change(SOURCE, edit).endswith("  square = difference**2\n        return square\n")


def test_a_code_that_is_not_there_is_refused():
    for right in ("x + target", "a"):                         # none, and several
        with pytest.raises(LookupError, match=r"write the present code into this Edit"):
            change(SOURCE, Edit("loss.py", "Loss.forward", right, "0"))
    with pytest.raises(LookupError, match=r"there is no Loss\.backward"):
        change(SOURCE, Edit("loss.py", "Loss.backward", "x", "0"))


def run(monkeypatch, capsys, *arguments):
    """What planted_faults.py prints with these arguments."""
    monkeypatch.setattr(sys, "argv", ["planted_faults.py", *map(str, arguments)])
    planted_faults.main()
    return capsys.readouterr().out


def test_a_puzzle_is_a_copy_with_one_fault(monkeypatch, capsys, tmp_path):
    number = NAMES.index("the temperature is missing from one term") + 1
    printed = run(monkeypatch, capsys, "--puzzle", number, "--to", tmp_path / "copy")
    fault = FAULTS[number - 1]
    assert fault.symptom.split()[0] in printed
    assert fault.name not in printed and fault.edits[0].file not in printed
    files = [str(path.relative_to(ROOT)) for path in ROOT.glob("minissl/**/*.py")]
    files += [path.name for path in ROOT.glob("*.py")]
    _, different, missing = filecmp.cmpfiles(ROOT, tmp_path / "copy", files, shallow=False)
    assert different == [fault.edits[0].file]
    assert missing == []


def test_an_answer_shows_place_lines_and_test(monkeypatch, capsys):
    number = NAMES.index("the temperature is missing from one term") + 1
    printed = run(monkeypatch, capsys, "--answer", number)
    fault = FAULTS[number - 1]
    edit = fault.edits[0]
    for part in (fault.name, edit.file, edit.function, edit.right, edit.wrong, fault.test):
        assert part in printed


def test_the_check_tells_caught_from_survived(monkeypatch, capsys, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "tests" / "test_code.py").write_text(
        "import sys\n"
        "sys.path.insert(0, '.')\n"
        "from doubling import double\n"
        "def test_two():\n"
        "    assert double(2) == 4\n"
        "def test_nothing():\n"
        "    pass\n"
    )
    monkeypatch.setattr(planted_faults, "ROOT", tmp_path)
    edit = Edit("doubling.py", "double", right="2 * x", wrong="3 * x")
    faults = [
        Fault("seen", "", "", "test_code.py::test_two", [edit]),
        Fault("unseen", "", "", "test_code.py::test_nothing", [edit]),
    ]
    monkeypatch.setattr(planted_faults, "FAULTS", faults)
    assert planted_faults.check(faults) == 1
    printed = capsys.readouterr().out
    assert "1 caught   seen" in printed
    assert "2 SURVIVED unseen" in printed
    assert "1 of 2 faults were caught" in printed


def test_no_test_runs_where_a_clean_one_fails(monkeypatch, capsys, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_code.py").write_text("def test_two():\n    assert False\n")
    monkeypatch.setattr(planted_faults, "ROOT", tmp_path)
    assert planted_faults.check([Fault("any", "", "", "test_code.py::test_two", [])]) == 1
    assert "nothing was checked" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["--puzzle", 0], ["--answer", 1000]])
def test_what_there_is_not_is_refused(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, *arguments)


def test_a_copy_has_the_code_and_no_runs(monkeypatch, tmp_path):
    root = tmp_path / "project"
    for folder in ("minissl/data", "runs/mlm", "data/cache", ".git"):
        (root / folder).mkdir(parents=True)
        (root / folder / "file").write_text("")
    monkeypatch.setattr(planted_faults, "ROOT", root)
    copy = copy_project(tmp_path / "copy")
    files = [str(path.relative_to(copy)) for path in copy.rglob("file")]
    assert files == ["minissl/data/file"]
