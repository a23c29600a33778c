"""Move the files of an older run in a folder out of the way of a new run: into older/1, older/2, ...

Each of these is a run's folder again, for the report as for sampling. config.json is moved last, so that the next move
completes one that was interrupted.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from udm_grpo.files.buckets import CHECKPOINTS, OLDER, listing, move_objects

CONFIG = "config.json"
RESULTS = (
    *("summary.json", "before_after.png", "report.html"),
    *("export", "export_raw", "export_lora", "export_lora_raw"),
)
"""What a run writes at its end."""
RUN_FILES = (
    *RESULTS,
    *("metrics.jsonl", "evaluations.jsonl", "heldout_scores", "pictures", "extremes", "kept_images", "tensorboard"),
    *("wandb", "wandb_run_id.txt", CHECKPOINTS, "environment.json", "prompt_warnings.json", CONFIG),
)
"""What a run writes into its folder, in the order in which it is moved."""


def set_aside(folder: Path, address: str = "", names: Sequence[str] = RUN_FILES) -> str | None:
    """Move these files and folders of a run to a new folder in its `older`; return it, or None if there are none.

    address: that of the bucket that `folder` is mirrored to, which alone holds checkpoints and exports. Files that are
    not a run's stay in place. Raises OSError, PlaceError.
    """
    remote = _top_level(address)
    mine = [name for name in names if _exists(folder / name)]
    theirs = [name for name in names if name in remote and name not in mine]
    if not (mine or theirs):
        return None
    number = _unfinished_or_next(folder, address, {*mine, *theirs})
    target = folder / OLDER / str(number)
    target.mkdir(parents=True, exist_ok=True)
    for name in theirs:
        move_objects(f"{address}/{name}", f"{address}/{OLDER}/{number}/{name}")
    for name in mine:
        (folder / name).rename(target / name)
    return f"{address}/{OLDER}/{number}" if address else str(target)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _top_level(address: str) -> set[str]:
    return {name.partition("/")[0] for name in listing(address)} if address else set()


def _unfinished_or_next(folder: Path, address: str, names: Collection[str]) -> int:
    """Return the number of a folder that an interrupted move began and these names complete, else the next number."""
    older = folder / OLDER
    there = {entry.name: {file.name for file in entry.iterdir()} for entry in older.iterdir()} if older.is_dir() else {}
    for name in listing(f"{address}/{OLDER}") if address else ():
        number, _, rest = name.partition("/")
        there.setdefault(number, set()).add(rest.partition("/")[0])
    last = max((int(number) for number in there if number.isascii() and number.isdigit()), default=0)
    begun = there.get(str(last), {CONFIG})
    return last if CONFIG in names and CONFIG not in begun and not begun & set(names) else last + 1
