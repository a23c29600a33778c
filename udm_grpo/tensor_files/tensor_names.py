"""What stands around the names of a state dict that was saved from inside a wrapper, and how it is left out."""

from collections.abc import Iterable

WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module")
"""Parts of names that activation checkpointing, FSDP, torch.compile and DDP (or DeepSpeed) put in, at any depth."""


def drop_wrappers(name: str) -> str:
    """Return a tensor's name without the parts that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped_names(names: Iterable[str], expected: Iterable[str]) -> tuple[dict[str, str], str]:
    """Return (name in the file -> name without what a wrapper put in, what that is); ({}, "") if nothing was put in.

    A name is changed only if all of the file's tensors that are expected come out of the same change: of leaving
    `WRAPPERS` out, and one prefix such as "model." or "transformer.". Raises ValueError if several changes fit.
    """
    names, wanted = list(names), set(expected)
    known = sum(name in wanted for name in names)
    if not names or not wanted or known == len(names):
        return {}, ""
    plain = {name: drop_wrappers(name) for name in names}
    changes: dict[str, dict[str, str]] = {}
    for prefix in _prefixes(plain.values(), wanted):
        inside = {name: text.removeprefix(prefix) for name, text in plain.items() if text.startswith(prefix)}
        changes[prefix] = {name: text for name, text in inside.items() if text in wanted}
    most = max(len(change) for change in changes.values())
    if most <= known:
        return {}, ""
    best = {prefix: change for prefix, change in changes.items() if len(change) == most}
    prefix, change = next(iter(best.items()))
    if len(best) > 1 or len(set(change.values())) < most:
        where = f", under {' and '.join(map(repr, best))}" if len(best) > 1 else ""
        raise ValueError(f"the file holds the model more than once{where}; save one of them alone")
    dropped = sorted({part for name in change for part in name.split(".") if part in WRAPPERS})
    said = [f"{part}." for part in dropped] + ([prefix] if prefix else [])
    return {name: change.get(name, name) for name in names}, " and ".join(repr(text) for text in said)


def _prefixes(names: Iterable[str], wanted: set[str]) -> list[str]:
    """Return the prefixes that turn any of the names into one that is wanted, the shortest first."""
    endings = {name.split(".", 1)[0] for name in wanted}
    found = {""}
    for name in names:
        parts = name.split(".")
        for at in range(len(parts)):
            if parts[at] in endings and ".".join(parts[at:]) in wanted:
                found.add("".join(f"{part}." for part in parts[:at]))
    return sorted(found, key=lambda prefix: (len(prefix), prefix))
