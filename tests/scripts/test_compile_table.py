"""The table of what the published model needs: made part by part, from what the compiler said before."""

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
    found = []

    def note(topology: str, program: str, no_search: bool) -> dict:
        found.append((topology, program, no_search))
        return compiled(topology, program, no_search)

    monkeypatch.setattr(compile_table, "compiled", note)
    return found


def test_the_table_goes_on_where_it_stopped(asked, tmp_path: Path):
    output = tmp_path / "table.md"
    part = ["--output", str(output), "--topology", "v5p:2x2x4", "--programs", "update"]
    assert compile_table.main([*part, "--no-search"]) == 0
    assert asked == [("v5p:2x2x4", "update", True)]
    row = "| v5p:2x2x4 | update | 32 |  | 1.00 | 2.00 | 0.00 | 0.50 | 3.50 | 16.00 | yes | 3 | 1.25 |"
    assert row in output.read_text()
    # With a search it is asked again, once.
    assert compile_table.main(part) == 0
    assert compile_table.main(part) == 0
    assert asked[1:] == [("v5p:2x2x4", "update", False)]
    assert row.replace("|  |", "| 64 |") in output.read_text()
    assert "| v5p:2x2x4 | update | all-gather 1.00 (9 x) |" in output.read_text()
    assert "- v5p:2x2x4, update: 96 need 17.00 GiB a device" in output.read_text()
    # All the rest; one of them does not fit.
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
    """Of the update, which needs most."""
    page = " ".join((ROOT / "configs" / f"{recipe}.py").read_text().split("Source:")[0].split())
    found = json.loads((ROOT / "configs" / "compile_table.json").read_text())
    assert found.keys() == set(TESTED)
    for name, programs in found.items():
        assert programs.keys() == set(PROGRAMS)
        assert all(one["searched"] and one["fits"] for one in programs.values())
        most = programs["update"]
        assert most["together"] == max(one["together"] for one in programs.values())
        needed = f"{most['together'] / GIB:.1f} of {most['limit'] / GIB:.2f} on {name}"
        assert needed in page.replace(" GiB", ""), needed
