"""A file on the first floor of bench/ is a command, and its README says what each is for."""

from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
FILES = sorted(path for path in BENCH.glob("*.py") if path.stem != "__init__")
COMMANDS = {
    *("bench" if path.stem == "__main__" else f"bench.{path.stem}" for path in FILES),
    *(f"bench.{path.parent.name}" for path in BENCH.glob("*/__main__.py")),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_on_the_first_floor_is_a_command(path):
    assert 'if __name__ == "__main__":' in path.read_text()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_answers_a_question(name):
    rows = [line.split("|") for line in (BENCH / "README.md").read_text().splitlines()]
    assert [row[1] for row in rows if len(row) > 3 and f"`python -m {name}`" in row[2]]


def test_each_record_is_named():
    page = (BENCH / "README.md").read_text()
    records = [path.name for path in (BENCH / "results").glob("*.json")]
    assert not [name for name in records if name not in page]
