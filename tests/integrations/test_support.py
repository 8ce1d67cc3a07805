"""The table of what was tried with which library says no more than there are tests."""

import re
from pathlib import Path

import support

ROOT = Path(__file__).parents[2]


def test_every_cell_of_the_table_names_a_test_that_exists() -> None:
    claims = ("exact", "to the bit", "the library's", "refused", "not possible", "runs", support.BATCH_MEANS)
    for library, cells in support.SUPPORT.items():
        assert len(cells) == len(support.COLUMNS), library
        for seen, test in cells:
            assert (seen in claims) == bool(test), f"{library}: {seen}"
            if test:
                file, _, name = test.partition("::")
                text = (Path(__file__).parent / file).read_text(encoding="utf-8")
                assert re.search(rf"^def {name}\(", text, re.MULTILINE), test


def test_the_table_in_the_page_is_this_one() -> None:
    page = support.PAGE.read_text(encoding="utf-8")
    assert support.rewritten(page) == page, "run: python tests/integrations/support.py"


PROGRAMS = {path.name: path for path in (ROOT / "examples").glob("*.py") if path.name != "quickstart.py"}


def test_a_program_has_40_to_80_lines() -> None:
    assert len(PROGRAMS) >= 12
    for name, path in PROGRAMS.items():
        assert 40 <= len(path.read_text(encoding="utf-8").splitlines()) <= 80, name


def test_every_program_is_included_in_one_page_and_not_copied() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    included = [
        name
        for page in pages
        for name in re.findall(r"^```\{literalinclude\} \.\./examples/(\w+\.py)", page, re.MULTILINE)
    ]
    assert sorted(included) == sorted(PROGRAMS)
    assert "```python" not in support.PAGE.read_text(encoding="utf-8")
