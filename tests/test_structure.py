"""The house stays readable: small rooms, small modules, small functions, unique names."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from compared_packages import OTHERS

PACKAGE = Path(__file__).parents[1] / "consyn_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
QUESTION = re.compile(r"(What|Which|How|Where|Why|Who|Whose|When)\b")
MODULE_LINES, FUNCTION_LINES, LOOP_FUNCTION_LINES, ROOM_FILES = 400, 50, 40, 14


def functions(module: Path) -> dict[str, int]:
    """Lines of every function, decorators and docstring included."""
    found = {}
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[f"{node.name}:{first}"] = (node.end_lineno or first) - first + 1
    return found


def name(module: Path) -> str:
    return str(module.relative_to(PACKAGE))


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES, ids=name)
def test_a_module_and_its_functions_are_short(module: Path) -> None:
    lines = module.read_text().count("\n")
    assert lines <= MODULE_LINES
    limit = LOOP_FUNCTION_LINES if name(module) == "training/loop.py" else FUNCTION_LINES
    assert {n: length for n, length in functions(module).items() if length > limit} == {}


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES, ids=name)
def test_a_docstring_begins_with_an_imperative_or_a_noun_phrase(module: Path) -> None:
    """Not with half a question."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, kinds)]
    first = [(ast.get_docstring(node) or "").partition("\n")[0] for node in nodes]
    assert [line for line in first if QUESTION.match(line)] == []


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES, ids=name)
def test_texts_are_written_in_utf_8_in_every_locale(module: Path) -> None:
    writes = [
        {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".write_text")
    ]
    assert [call for call in writes if call.get("encoding") != "'utf-8'"] == []


def test_files_that_import_packages_of_dev_have_only_slow_tests() -> None:
    """CI would never run the others."""
    texts = {path.name: path.read_text() for path in Path(__file__).parent.rglob("test_*.py")}
    files = {name: text for name, text in texts.items() if OTHERS.search(text)}
    slow = re.compile(r"^pytestmark = .*mark\.slow", re.MULTILINE)
    assert files
    assert [name for name, text in files.items() if not slow.search(text)] == []


def test_every_room_is_in_the_tree_of_the_structure_page() -> None:
    page = (PACKAGE.parent / "docs" / "design" / "structure.md").read_text()
    tree = re.findall(r"[a-z0-9_]+(?=/)", page)
    rooms = {path.parent.name for path in PACKAGE.rglob("__init__.py")} - {PACKAGE.name}
    assert sorted(rooms - set(tree)) == []


def test_a_room_has_few_files() -> None:
    rooms = Counter(module.parent for module in MODULES if module.name != "__init__.py")
    assert {str(room): count for room, count in rooms.items() if count > ROOM_FILES} == {}


def test_a_file_name_means_one_thing() -> None:
    """A command's module in cli/ may be named like what it calls; nothing else repeats a name."""
    stems = Counter(module.stem for module in MODULES if module.name != "__init__.py")
    assert {stem for stem, count in stems.items() if count > 1} == set()
