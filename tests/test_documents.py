"""The documents agree with the code: paths, quoted lines, flags."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "README.zh.md", "RESULTS.md", "EXPERIMENTS.md"]
CODE = [*ROOT.glob("*.py"), *ROOT.glob("minissl/**/*.py"), *ROOT.glob("examples/*.py")]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_a_document_names_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:minissl|tests|examples|pictures)/[\w./]+\.\w+", text)
    scripts = re.findall(r"python (\w+\.py)", text)
    assert paths and scripts
    missing = [path for path in {*paths, *scripts} if not (ROOT / path).exists()]
    assert missing == []


FLAGS_OF_OTHERS = {"nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "run-path"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_that_a_document_names_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)) - FLAGS_OF_OTHERS
    code = ""
    for path in [*CODE, *ROOT.glob("tests/**/*.py")]:
        if not path.name.startswith("test_"):
            code += path.read_text(encoding="utf-8")
    known = set(re.findall(r"--([a-z][\w-]+)", code))
    for field in re.findall(r"^    (\w+): ", code, re.MULTILINE):
        known.add(field.replace("_", "-"))
    assert len(flags) > 5
    assert flags - known == set()


def test_every_entry_that_the_code_names_exists():
    """Such as: EXPERIMENTS.md, "Which temperature?"."""
    titles = {}
    for name in ("EXPERIMENTS.md", "RESULTS.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        titles[name] = set(re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    named = []
    for path in CODE:
        code = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text(encoding="utf-8"))
        named += re.findall(r'(EXPERIMENTS\.md|RESULTS\.md),? (?:section )?"([^"]+)"', code)
    assert len(named) > 10
    assert [entry for entry in named if entry[1] not in titles[entry[0]]] == []


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_code_that_the_readme_shows_is_in_the_code(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    methods = text[:text.index("python finetune.py runs/mlm")]        # the three methods
    code = set()
    for path in CODE:
        for line in path.read_text(encoding="utf-8").splitlines():
            code.add(line.split("  #")[0].strip())
    shown = []
    for block in re.findall(r"```python\n(.*?)```", methods, re.DOTALL):
        shown += [line.split("  #")[0].strip() for line in block.splitlines()]
    shown = [line for line in shown if line not in ("", "...")]
    assert len(shown) > 10
    assert [line for line in shown if line not in code] == []
