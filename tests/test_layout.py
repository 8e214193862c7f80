"""The house rules that no linter knows."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for tree in ("server/deltamux", "kernels/deltamux_kernels")
    for path in (ROOT / tree).rglob("*.py")
    if "v1" not in path.relative_to(ROOT).parts
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
# Names that say nothing of what is inside.
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base_classes"}
# Folders of tests that mirror no folder of the source.
ACROSS = {"end_to_end", "peers", "kernels", "counts", "loop", "simulation"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Without Triton kernels, whose loop over tiles is one function by nature."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not any(
            "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            yield node


def test_there_is_something_to_check():
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_source_file(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_FILE_LINES, "too long for one job"
    assert path.stem not in EMPTY_NAMES, "a name that says nothing"
    assert ast.get_docstring(tree) or (path.name == "__init__.py" and not text.strip()), (
        "no docstring"
    )
    long = [f.name for f in functions(tree) if f.end_lineno - f.lineno >= MAX_FUNCTION_LINES]
    assert long == [], "functions that do not fit on a screen"


def test_source_roots_are_no_packages():
    """An importable `kernels` shadows the package that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "server" / "__init__.py").exists()
    assert {p.name for p in (ROOT / "kernels").iterdir() if p.suffix != ".md"} - {
        "__pycache__"
    } == {"deltamux_kernels"}


def test_every_package_says_what_it_is():
    folders = {path.parent for path in SOURCES}
    missing = [name(folder) for folder in folders if not (folder / "__init__.py").exists()]
    assert missing == []


def test_tests_mirror_the_source():
    packages = {
        path.parent.relative_to(ROOT / "server" / "deltamux")
        for path in SOURCES
        if "server" in path.parts
    }
    for path in TESTS:
        folder = path.parent.relative_to(ROOT / "tests")
        assert not folder.parts or ACROSS & {*folder.parts} or folder in packages, name(path)
        assert path.name != "__init__.py", name(path)


def test_documents_speak_of_the_product_only():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "training").glob("*.md")]
    assert pages
    for page in pages:
        for word in (*(f"/{folder}/" for folder in ("tmp", "work")), "TODO", "FIXME"):
            assert word not in page.read_text(), f"{name(page)}: {word}"
