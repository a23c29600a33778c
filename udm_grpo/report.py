"""Write the report of a training run, or compare several: one HTML file that needs no server and no network.

    python -m udm_grpo.report outputs/shapes
    python -m udm_grpo.report outputs/shapes outputs/other --output comparison.html

A run writes its own report at its end, as report.html in its output_dir; this command writes one at any time, also of a
run that is still training or was killed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser
from rewards_bridge.redaction import guarded
from udm_grpo.devices import prepare
from udm_grpo.files.atomic import replace_file
from udm_grpo.files.buckets import NOT_BROUGHT_BACK, local
from udm_grpo.files.places import check_flags, is_bucket
from udm_grpo.reporting.report_data import report_data
from udm_grpo.reporting.report_page import page
from udm_grpo.reporting.run_folder import RunFolder, RunFolderError, read_run

NAME = "report.html"


def write_report(folders: Sequence[str | Path], output: str | Path) -> None:
    """Write the report of these runs atomically; raise RunFolderError naming everything that is wrong."""
    runs: list[RunFolder] = []
    problems: list[str] = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except RunFolderError as error:
            problems.append(str(error))
    if problems:
        raise RunFolderError("\n".join(problems))
    data = report_data(runs)
    names = [run["name"] for run in data["runs"]]
    text = page(data, names[0] if len(names) == 1 else f"{len(names)} runs: {', '.join(names)}")
    replace_file(Path(output), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a user's mistake, reported without a traceback."""
    prepare()
    parser = Parser(
        prog="python -m udm_grpo.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="OUTPUT_DIR", help="output_dir of a training run")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"the file to write; default: {NAME} in the run's folder, or here for several runs",
    )
    args = parser.parse_args(argv)
    beside = len(args.runs) == 1 and not is_bucket(args.runs[0])
    output = Path(args.output or (Path(args.runs[0]) / NAME if beside else NAME))
    try:
        check_flags(args, ("runs",))
        if output.suffix.lower() not in (".html", ".htm"):
            raise RunFolderError(f"--output is {output}; give a file whose name ends in .html.")
        write_report([local(run, NOT_BROUGHT_BACK) for run in args.runs], output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
