"""tests/faults/README.md says which test shows what: each that it names exists, and each line has one or a reason."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS / "faults" / "README.md"
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)(?:\[([^\]]+)\])?`")


def rows(page: str) -> list[list[str]]:
    """The cells of every line of its tables."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def functions(path: Path) -> set[str]:
    """The tests of a file."""
    nodes = ast.parse(path.read_text()).body
    return {
        node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def faults(page: str) -> list[str]:
    """What is wrong with the page, in words."""
    wrong = []
    for what, becomes, shown in rows(page):
        named = NAMED.findall(shown)
        if re.sub(r"[,\s]", "", NAMED.sub("", shown)) not in ("", "–"):
            wrong.append(f"{what}: {shown!r} is more than names of tests")
        if not named and not re.search(r"not tested: \w+|`make \w+.*`", becomes):
            wrong.append(f"{what}: neither a test nor a reason")
        for file, test, case in named:
            path = TESTS / file
            if not path.is_file() or test not in functions(path):
                wrong.append(f"{what}: there is no test {test} in {file}")
            elif case and f'"{case}"' not in path.read_text():
                wrong.append(f"{what}: {test} in {file} has no case {case!r}")
    return wrong


def test_every_test_of_the_list_exists():
    page = PAGE.read_text()
    assert len(rows(page)) > 50
    assert not faults(page)


def test_the_checker_can_fail():
    good = "| a | b | `faults/test_forks.py::test_after_use` |"
    assert not faults(good)
    for bad in (
        good.replace("after_use", "after_lunch"),
        good.replace("faults/", "laws/"),
        good.replace("after_use", "after_use[no such case]"),
        "| a | b | – |",
        "| a | b | somewhere |",
    ):
        assert faults(bad), bad
