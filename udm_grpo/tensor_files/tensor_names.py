"""Remove what wrappers add to the tensor names of a state dict."""

from collections.abc import Iterable

WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module")
"""Parts of names that activation checkpointing, FSDP, torch.compile and DDP (or DeepSpeed) insert, at any depth."""


def drop_wrappers(name: str) -> str:
    """Return a tensor's name without the parts that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped_names(names: Iterable[str], expected: Iterable[str]) -> tuple[dict[str, str], str]:
    """Return (name in the file -> name without a wrapper's parts, the removed parts); ({}, "") if there are none.

    Names are changed only if all of the file's expected tensors result from the same change: removing `WRAPPERS` and
    one prefix such as "model." or "transformer.". Raises ValueError if several changes fit.
    """
    names, expected_names = list(names), set(expected)
    known = sum(name in expected_names for name in names)
    if not names or not expected_names or known == len(names):
        return {}, ""
    plain = {name: drop_wrappers(name) for name in names}
    changes: dict[str, dict[str, str]] = {}
    for prefix in _prefixes(plain.values(), expected_names):
        inside = {name: text.removeprefix(prefix) for name, text in plain.items() if text.startswith(prefix)}
        changes[prefix] = {name: text for name, text in inside.items() if text in expected_names}
    most = max(len(change) for change in changes.values())
    if most <= known:
        return {}, ""
    best = {prefix: change for prefix, change in changes.items() if len(change) == most}
    prefix, change = next(iter(best.items()))
    if len(best) > 1 or len(set(change.values())) < most:
        where = f", under {' and '.join(map(repr, best))}" if len(best) > 1 else ""
        raise ValueError(f"the file holds the model more than once{where}; save only one of them")
    dropped = sorted({part for name in change for part in name.split(".") if part in WRAPPERS})
    removed = [f"{part}." for part in dropped] + ([prefix] if prefix else [])
    return {name: change.get(name, name) for name in names}, " and ".join(repr(text) for text in removed)


def _prefixes(names: Iterable[str], expected: set[str]) -> list[str]:
    """Return the prefixes whose removal turns any of the names into an expected one, the shortest first."""
    endings = {name.split(".", 1)[0] for name in expected}
    prefixes = {""}
    for name in names:
        parts = name.split(".")
        for at in range(len(parts)):
            if parts[at] in endings and ".".join(parts[at:]) in expected:
                prefixes.add("".join(f"{part}." for part in parts[:at]))
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
