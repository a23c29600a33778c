"""Means and their intervals: against scipy's bootstrap, by hand, and GenEval's rule for the overall score."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from udm_grpo.scoring.folder_scores import Mark, Scored
from udm_grpo.scoring.score_summary import bootstrap, columns, official_lines, spread, summarize, write_official
from udm_grpo.scoring.score_tables import bounds, number, table


def scored(rows: list[tuple[int, str, float]], official: bool = True, details: str = "") -> Scored:
    """Return marks of (prompt, tag, score) by a scorer "judge", with the score as "official" too."""
    marks = [
        Mark(f"{number}.png", prompt, "", "judge", score, {"official": score} if official else {}, "why", details)
        for number, (prompt, _, score) in enumerate(rows)
    ]
    prompts = {prompt: {"tag": tag, "prompt": f"prompt {prompt}"} for prompt, tag, _ in rows}
    return Scored(Path("pictures"), {"judge": {"scorer": "judge", "options": {}}}, prompts, marks)


def test_intervals_are_those_of_scipy() -> None:
    """Prompts with different numbers of pictures: the mean is a ratio of sums, which scipy resamples in pairs."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 80).astype(float)
    sums = (rng.random(80) < 0.3) * counts
    resamples = 4000
    means = bootstrap(sums[:, None], counts, resamples, (0, 0))[:, 0]
    theirs = scipy.stats.bootstrap(
        (sums, counts),
        lambda x, y, axis: x.sum(axis) / y.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    assert means.std() == pytest.approx(theirs.standard_error, rel=0.05)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
    assert high - low > 0.15


def test_pictures_of_a_prompt_are_not_taken_for_independent() -> None:
    """A hundred equal pictures of each of ten prompts: the interval is that of ten values, not of a thousand."""
    rows = [(prompt, "untagged", float(prompt % 2)) for prompt in range(10) for _ in range(100)]
    table = columns(scored(rows), "judge")
    means = spread(table, 2000, 0)["mean"][1:, 0]
    assert means.std() == pytest.approx(0.5 / np.sqrt(10), rel=0.06)


def test_the_overall_score_is_the_mean_of_the_tasks() -> None:
    rows = [(0, "colors", 1.0), (0, "colors", 0.0), (1, "colors", 1.0), (2, "counting", 0.0), (3, "counting", 0.0)]
    summary = summarize(scored(rows), ["first"], 200, 0)
    values = summary["scorers"]["judge"]["values"]["official"]
    assert values["tags"]["colors"]["value"] == pytest.approx(2 / 3)  # of pictures, as the benchmark counts
    assert values["tags"]["counting"] == {"value": 0.0, "low": 0.0, "high": 0.0, "prompts": 2, "images": 2}
    assert values["overall"]["value"] == pytest.approx(1 / 3)
    assert values["mean"]["value"] == pytest.approx(2 / 5)
    assert list(values["tags"]) == ["counting", "colors"]
    assert summary["scorers"]["judge"]["correct_prompts"] == 0.5
    first, lacking = summary["warnings"]
    assert first == "first"
    assert "the mean over counting, colors; " in lacking
    assert lacking.endswith("missing tasks of GenEval: single_object, two_object, position, color_attr.")


def test_the_same_seed_gives_the_same_intervals() -> None:
    rng = np.random.default_rng(3)
    scores = scored([(prompt, "untagged", value) for prompt, value in enumerate(rng.random(20).tolist())])
    first, again, other = (json.dumps(summarize(scores, [], 300, seed)["scorers"]) for seed in (0, 0, 1))
    assert first == again != other


def test_one_prompt_has_no_interval() -> None:
    values = summarize(scored([(0, "untagged", 0.25)]), [], 100, 0)["scorers"]["judge"]["values"]
    assert values["score"]["mean"] == {"value": 0.25, "low": None, "high": None, "prompts": 1, "images": 1}
    assert bounds(values["score"]["mean"]) == "-"


def test_many_prompts_are_resampled_in_parts() -> None:
    counts = np.ones(50_000)
    means = bootstrap(np.arange(50_000.0)[:, None], counts, 100, (0,))
    assert means.shape == (100, 1)
    assert means.std() == pytest.approx(50_000 / np.sqrt(12 * 50_000), rel=0.3)


def test_raw_values_that_some_pictures_lack_are_left_out() -> None:
    scores = scored([(0, "untagged", 1.0), (1, "untagged", 0.0)])
    del scores.marks[1].raw["official"]
    assert columns(scores, "judge").names == ("score",)
    assert write_official(scores, Path("nowhere")) == []
    (warning,) = summarize(scores, [], 10, 0)["warnings"]
    assert warning.startswith("judge: 1 of 2 pictures have no raw value 'official', which is left out here")


def test_a_raw_value_named_score_is_kept_beside_the_score() -> None:
    scores = scored([(0, "untagged", 1.0), (1, "untagged", 0.0)], official=False)
    for mark in scores.marks:
        mark.raw["score"] = 7.0
    values = summarize(scores, [], 10, 0)["scorers"]["judge"]["values"]
    assert {name: entry["mean"]["value"] for name, entry in values.items()} == {"score": 0.5, "raw/score": 7.0}


@pytest.mark.parametrize("details", ["", "no JSON", "[1]"])
def test_a_judge_without_details_gives_its_reasons(details: str) -> None:
    line = official_lines(scored([(0, "colors", 0.0)], details=details), "judge")[0]
    assert (line["correct"], line["reason"], line["details"]) == (False, "why", "{}")


def test_several_judges_have_a_results_file_each(tmp_path: Path) -> None:
    one, two = scored([(0, "colors", 0.0)]), scored([(0, "colors", 1.0)])
    marks = [*one.marks, *(Mark(**{**vars(mark), "scorer": "other"}) for mark in two.marks)]
    both = Scored(one.samples, one.scorers | {"other": one.scorers["judge"]}, one.prompts, marks)
    assert [path.name for path in write_official(both, tmp_path)] == ["results_judge.jsonl", "results_other.jsonl"]
    assert json.loads((tmp_path / "results_other.jsonl").read_text())["correct"] is True


def test_tables_take_any_text() -> None:
    assert table(["a"], [["x|y\nz"]]) == "| a |\n| --- |\n| x\\|y z |"
    assert [number(value) for value in (None, 0.12345, -9.5, 23.8123, 1234.5)] == [
        "-",
        "0.123",
        "-9.500",
        "23.81",
        "1234",
    ]
