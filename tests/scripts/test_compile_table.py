"""scripts/compile_table.py fills its table part by part and reuses earlier results; the recipes quote the table."""

import json
from pathlib import Path

import pytest
from running import ROOT

from scripts import compile_table
from udm_grpo.compile_check.compile_only import PROGRAMS
from udm_grpo.compile_check.topology import TESTED

GIB = 2**30


def compiled(topology: str, program: str, no_search: bool) -> dict:
    sizes = {"arguments": GIB, "temporaries": 2 * GIB, "output": 0, "beside": GIB // 2, "together": 7 * GIB // 2}
    return {
        "program": program,
        "micro_batch": 32,
        "limit": 16 * GIB,
        "fits": topology != "v6e:4x4",
        "largest": None if no_search else 64,
        "beyond": "" if no_search else "96 need 17.00 GiB a device",
        "searched": not no_search,
        "flops": 3 * 10**12,
        "repeated": 1.25,
        "collectives": {"all-gather": {"count": 9, "bytes": GIB}},
        **sizes,
    }


@pytest.fixture
def asked(monkeypatch):
    """The arguments of the compilations that the command asks for."""
    arguments = []

    def note(topology: str, program: str, no_search: bool) -> dict:
        arguments.append((topology, program, no_search))
        return compiled(topology, program, no_search)

    monkeypatch.setattr(compile_table, "compiled", note)
    return arguments


def test_the_table_continues_where_it_stopped(asked, tmp_path: Path):
    output = tmp_path / "table.md"
    part = ["--output", str(output), "--topology", "v5p:2x2x4", "--programs", "update"]
    assert compile_table.main([*part, "--no-search"]) == 0
    assert asked == [("v5p:2x2x4", "update", True)]
    row = "| v5p:2x2x4 | update | 32 |  | 1.00 | 2.00 | 0.00 | 0.50 | 3.50 | 16.00 | yes | 3 | 1.25 |"
    assert row in output.read_text()
    # With a search the program is compiled again, once.
    assert compile_table.main(part) == 0
    assert compile_table.main(part) == 0
    assert asked[1:] == [("v5p:2x2x4", "update", False)]
    assert row.replace("|  |", "| 64 |") in output.read_text()
    assert "| v5p:2x2x4 | update | all-gather 1.00 (9 x) |" in output.read_text()
    assert "- v5p:2x2x4, update: 96 need 17.00 GiB a device" in output.read_text()
    # All others are compiled; one of them does not fit.
    assert compile_table.main(["--output", str(output)]) == 1
    assert len(asked) == 1 + len(TESTED) * len(PROGRAMS)
    assert set(json.loads(output.with_suffix(".json").read_text())) == set(TESTED)


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        compile_table.main(["--help"])
    assert done.value.code == 0
    assert "python -m scripts.compile_table --output configs/compile_table.md" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["geneval", "pickscore", "ocr"])
def test_the_recipes_say_what_the_table_says(recipe):
    """Each page quotes the memory of the update, which needs most."""
    page = " ".join((ROOT / "configs" / f"{recipe}.py").read_text().split("Source:")[0].split())
    results = json.loads((ROOT / "configs" / "compile_table.json").read_text())
    assert results.keys() == set(TESTED)
    for name, programs in results.items():
        assert programs.keys() == set(PROGRAMS)
        assert all(one["searched"] and one["fits"] for one in programs.values())
        most = programs["update"]
        assert most["together"] == max(one["together"] for one in programs.values())
        needed = f"{most['together'] / GIB:.1f} of {most['limit'] / GIB:.2f} on {name}"
        assert needed in page.replace(" GiB", ""), needed
