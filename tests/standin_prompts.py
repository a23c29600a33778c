"""Prompt files in the formats of the public release, with a few prompts of our own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COUNTS = {2: "two", 3: "three", 4: "four"}
SCENES = (
    "A tin robot waters tomatoes on a balcony, morning light",
    "a map of an island where all roads are rivers",
    "two foxes asleep under a wool blanket, pencil drawing",
    "portrait of a lighthouse keeper, oil on canvas",
    "un faro sobre un acantilado al atardecer",
    "macro photo of frost on a bicycle bell",
    "a paper theatre with a dragon made of stamps",
    "an empty tram at night, rain, neon reflections",
)
SIGNS = (
    'A shop window with a sign that says "OPEN LATE" in gold letters',
    'A wooden board on a beach that reads "Lifeguard"',
    'A birthday cake with the words "Happy 40" in blue icing',
    'A mug on a desk, printed with "Monday", soft light',
    'A train ticket for platform "9", lying on a stone floor',
    'A blackboard in a classroom with "E = mc2" in chalk',
)


def one(tag: str, prompt: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return a line of GenEval's metadata."""
    return {"tag": tag, "include": list(include), **({"exclude": list(exclude)} if exclude else {}), "prompt": prompt}


def item(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    """Return an entry of "include"."""
    return {"class": name, "count": count, **more}


def counted(plural: str, name: str, count: int) -> dict[str, Any]:
    """Return a line with the tag "counting"."""
    return one(
        "counting",
        f"a photo of {COUNTS[count]} {plural}",
        item(name, count),
        exclude=[{"class": name, "count": count + 1}],
    )


def beside(first: str, relation: str, second: str) -> dict[str, Any]:
    """Return a line with the tag "position"."""
    prompt = f"a photo of a {first} {relation} a {second}"
    return one("position", prompt, item(second), item(first, position=[relation, 0]))


GENEVAL_TRAIN = (
    one("single_object", "a photo of a vase", item("vase")),
    one("two_object", "a photo of a vase and a train", item("vase"), item("train")),
    counted("vases", "vase", 3),
    one("colors", "a photo of a brown train", item("train", color="brown")),
    beside("train", "above", "vase"),
    one(
        "color_attr",
        "a photo of a brown train and a pink vase",
        item("train", color="brown"),
        item("vase", color="pink"),
    ),
    counted("clocks", "clock", 2),
    one("colors", "a photo of a green clock", item("clock", color="green")),
    beside("clock", "left of", "couch"),
    one("two_object", "a photo of a couch and a computer mouse", item("couch"), item("computer mouse")),
)
GENEVAL_TEST = (
    one("single_object", "a photo of a bench", item("bench")),
    one("two_object", "a photo of a bench and a kite", item("bench"), item("kite")),
    counted("kites", "kite", 4),
    one("colors", "a photo of a purple kite", item("kite", color="purple")),
    beside("kite", "below", "bench"),
    one("color_attr", "a photo of a red kite and a blue bench", item("kite", color="red"), item("bench", color="blue")),
)


def make_prompts(data: Path) -> Path:
    """Write data/geneval, data/pickscore, data/ocr and data/dpgbench; return `data`."""
    _lines(data / "geneval" / "train_metadata.jsonl", map(json.dumps, GENEVAL_TRAIN))
    _lines(data / "geneval" / "evaluation_metadata.jsonl", map(json.dumps, GENEVAL_TEST))
    dense = [
        {
            "id": number,
            "prompt": line["prompt"],
            "dense_prompt": f"The image is a real photo, {line['prompt'][8:]}, in detail.",
        }
        for number, line in enumerate(GENEVAL_TEST)
    ]
    _list(data / "geneval" / "prompts.json", dense)
    _lines(data / "pickscore" / "train.txt", SCENES[:6])
    _lines(data / "pickscore" / "test.txt", SCENES[4:])
    _list(data / "pickscore" / "prompts.json", [{"id": n, "prompt": text} for n, text in enumerate(SCENES[4:])])
    _lines(data / "ocr" / "train.txt", SIGNS[:4])
    _lines(data / "ocr" / "test.txt", SIGNS[4:])
    stems = ("111", "diffusiondb0", "COCOval2014000000000042")
    _list(data / "dpgbench" / "prompts.json", [{"id": s, "prompt": t} for s, t in zip(stems, SCENES[:3], strict=True)])
    return data


def _lines(path: Path, lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _list(path: Path, content: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
