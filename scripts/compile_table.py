"""Compile the published model for TPU slices that are not here, and write what it needs as a table.

    python -m scripts.compile_table --output configs/compile_table.md

Goes through TOPOLOGIES and the programs of configs/geneval.py one by one (up to minutes each); the numbers gather in a
.json beside the output, and the same command continues where it stopped. --topology and --programs take a part.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards_bridge.flags import Parser
from rewards_bridge.redaction import guarded
from udm_grpo.compile_check.compile_only import PROGRAMS
from udm_grpo.compile_check.topology import GIB, TESTED
from udm_grpo.files.places import local_args
from udm_grpo.reporting.metrics import write_json

CONFIG = "configs/geneval.py"
ATTENTION = "--config.model.attention=xla"
HEAD = f"""# What URSA-1.7B-IBQ512 at 512 x 512 needs, by the TPU compiler

`python -m udm_grpo.train --config {CONFIG} {ATTENTION} --compile-only --topology NAME`, otherwise
with the settings as they stand in that file (parameters, moments and gradients over all devices, whole blocks
recomputed), for 128 images and 384 training states an iteration; libtpu 0.0.42.1, no TPU. Made by
`python -m scripts.compile_table --output configs/compile_table.md`.

These are of plain attention; a run on a TPU takes splash (model.attention=auto), which writes no array of scores.

GiB of one device: arguments, temporaries, output that takes no argument's place, what lies beside (optimizer state,
policy, reference and image tokenizer, where they are no argument), and their sum, of what programs may use. A tpu7x
chip is two devices. Micro-batch: images or states at a time over all devices, as configured, and the largest that fits
(of those that divide the batch; under the table stands what is in the way of more). TFLOP: matrix products and
convolutions of one execution on all devices together; "done" is how often the devices together do that work (below 1
where the compiler made a loop of a product, whose body it counts once). Collectives: GiB of their results on one device
in one execution (of the operands, for a reduce-scatter), loops counted in full. For tpu7x the compiler hands some to
the SparseCores; its reference gathers the head for every part of a micro-batch, which the others do once.

| slice | program | micro-batch | largest | arguments | temporaries | output | beside | sum | of | fits | TFLOP | done |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 0 if everything fits."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the table, .md")
    parser.add_argument("--topology", action="append", help="one slice, may be repeated (default: all of TESTED)")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="some of rollout,decode,reference,update")
    parser.add_argument("--no-search", action="store_true", help="do not look for the largest micro-batch")
    given = local_args(parser, argv)
    numbers = given.output.with_suffix(".json")
    found: dict[str, dict[str, Any]] = json.loads(numbers.read_text()) if numbers.exists() else {}
    wanted = given.topology or TESTED
    for topology, program in ((topology, program) for program in given.programs.split(",") for topology in wanted):
        known = found.setdefault(topology, {}).get(program)
        if known is None or (not known["searched"] and not given.no_search):
            found[topology][program] = compiled(topology, program, given.no_search)
            write_json(numbers, found)
        given.output.write_text(table(found), encoding="utf-8")
    return 0 if all(one["fits"] for part in found.values() for one in part.values()) else 1


def compiled(topology: str, program: str, no_search: bool) -> dict[str, Any]:
    """Return what `--compile-only` reports of one program, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "udm_grpo.train", "--config", CONFIG, ATTENTION, "--compile-only"]
        command += [f"--topology={topology}", f"--programs={program}", f"--report={report}"]
        subprocess.run([*command, *(["--no-search"] if no_search else [])], check=False)
        if not report.exists():
            raise SystemExit(f"{topology}, {program}: no report; the error stands above.")
        record = json.loads(report.read_text())
    head = {"devices": record["devices"], "kind": record["kind"], "searched": not no_search}
    return head | record["programs"][0]


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown page."""
    lines, moved, ends = [], [], []
    for topology in sorted(found, key=[*TESTED, *found].index):
        for name in sorted(found[topology], key=PROGRAMS.index):
            one = found[topology][name]
            sizes = (one[key] / GIB for key in ("arguments", "temporaries", "output", "beside", "together", "limit"))
            done = "" if one["repeated"] is None else f"{one['repeated']:.2f}"
            most = (one["largest"] or "none") if one["searched"] else ""
            cells = [topology, name, one["micro_batch"], most, *(f"{size:.2f}" for size in sizes)]
            cells += ["yes" if one["fits"] else "no", f"{one['flops'] / 1e12:.4g}", done]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
            if one.get("beyond"):
                ends.append(f"- {topology}, {name}: {one['beyond']}")
            kinds = one["collectives"].items()
            by_kind = ", ".join(f"{kind} {part['bytes'] / GIB:.2f} ({part['count']} x)" for kind, part in kinds)
            moved.append(f"| {topology} | {name} | {by_kind or 'none'} |")
    tail = "\n## Collectives\n\n| slice | program | GiB by kind (how often) |\n|---|---|---|\n"
    why = "\n".join(["", "Larger micro-batches that do not fit:", "", *ends, ""]) if ends else ""
    return HEAD + "\n".join(lines) + "\n" + why + tail + "\n".join(moved) + "\n"


if __name__ == "__main__":
    sys.exit(guarded(main))
