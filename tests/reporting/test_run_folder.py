"""How a run's folder becomes a report's data: whole, unfinished, of an older version, damaged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import PROMPTS, evaluation, write_run

from udm_grpo.report import main
from udm_grpo.reporting import report_data as data_module
from udm_grpo.reporting.metrics import MetricsWriter
from udm_grpo.reporting.report_data import encode, names_of, report_data
from udm_grpo.reporting.report_page import page
from udm_grpo.reporting.run_folder import read_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def shown(folder: Path) -> dict:
    return report_data([read_run(folder)])["runs"][0]


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_whole_run(whole):
    data = shown(whole)
    assert (data["done"], data["iterations"], data["finished"], data["seconds"]) == (12, 12, True, 754.2)
    assert data["curves"]["steps"] == list(range(1, 13))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(data["curves"]["values"]["kl"], [line["kl"] for line in lines], rtol=1e-5)
    assert data["curves"]["values"]["seconds/update"][0] == 14
    assert [(one["step"], one["label"], one["prompts"]) for one in data["evaluations"]] == [
        (0, "base", 12),
        (4, "", 6),
        (8, "", 6),
        (12, "final", 12),
    ]
    assert data["evaluations"][3]["tags"]["colors"]["strict"] == pytest.approx(
        evaluation(12, 12, 12)["tags"]["colors"]["strict"], rel=1e-5
    )
    assert [(one["step"], one["label"]) for one in data["moments"]] == [(0, "base"), (4, ""), (8, ""), (12, "final")]
    assert [cell["caption"] for cell in data["moments"][2]["cells"]] == list(PROMPTS)
    assert [one["step"] for one in data["extremes"]] == [0, 4, 8, 12]
    assert data["notes"] == []


def test_the_base_of_a_run_that_noted_none_on_its_way_is_that_of_the_summary(run):
    kept = (run / "evaluations.jsonl").read_text().splitlines(keepends=True)[1:]
    (run / "evaluations.jsonl").write_text("".join(kept))
    (run / "pictures" / "000000.png").unlink()
    data = shown(run)
    assert [(one["step"], one["label"]) for one in data["evaluations"]][:2] == [(0, "base"), (4, "")]
    assert [(one["step"], one["label"]) for one in data["moments"]][:2] == [(0, "base"), (4, "")]


def test_a_run_that_has_only_begun(tmp_path):
    with MetricsWriter(tmp_path / "run"):
        pass
    data = shown(tmp_path / "run")
    assert (data["done"], data["finished"]) == (0, False)
    assert data["curves"] == {"per": 1, "steps": [], "values": {}}
    assert data["evaluations"] == data["moments"] == data["extremes"] == []


def test_a_torn_last_line_is_noted(run):
    append(run / "metrics.jsonl", '{"step": 13, "rew')
    append(run / "evaluations.jsonl", '{"step": ')
    data = shown(run)
    assert data["done"] == 12
    assert [note.split(":")[0] for note in data["notes"]] == ["metrics.jsonl", "evaluations.jsonl"]


def test_what_an_older_run_left_in_the_folder_is_passed_over(run):
    """A new run in the same folder was killed after 5 iterations."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:5]
    (run / "metrics.jsonl").write_text("".join(lines))
    data = shown(run)
    assert not data["finished"]
    assert [one["step"] for one in data["evaluations"]] == [0, 4]
    assert [one["step"] for one in data["moments"]] == [0, 4]
    assert [one["step"] for one in data["extremes"]] == [0, 4]
    assert "summary.json is of 12 iterations, but 5 are done" in data["notes"][0]


def test_numbers_that_are_not_finite_leave_gaps_and_are_noted(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {"kl": 0.1, "words": "none"})
        with pytest.warns(RuntimeWarning, match="kl is nan"):
            metrics.write(2, {"kl": float("nan")})
        metrics.write(3, {"kl": 0.3})
    data = shown(tmp_path)
    assert data["curves"]["values"] == {"kl": [0.1, None, 0.3]}
    assert data["notes"] == ["kl was not finite, first at iteration 2."]


def test_iterations_without_an_update_are_noted(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for step, skipped in enumerate((0.0, 1.0, 0.5, 1.0), start=1):
            metrics.write(step, {"dead_groups": skipped, "skipped": skipped})
    data = shown(tmp_path)
    assert data["curves"]["values"]["dead_groups"] == [0, 1, 0.5, 1]
    assert data["notes"] == [
        "2 of 4 iterations made no update, first iteration 2: in every group all images got the same score "
        "(dead groups)."
    ]


def test_long_curves_and_many_pictures_are_thinned_and_that_is_said(whole, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_POINTS", 5)
    monkeypatch.setattr(data_module, "MAX_MOMENTS", 3)
    monkeypatch.setattr(data_module, "MAX_PROMPTS", 3)
    monkeypatch.setattr(data_module, "MAX_EXTREMES", 2)
    data = report_data([replace(read_run(whole), before_after=None)] * 2)["runs"][0]
    lines = [json.loads(line)["reward"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert data["curves"]["steps"] == [3, 6, 9, 12]
    np.testing.assert_allclose(data["curves"]["values"]["reward"], np.reshape(lines, (4, 3)).mean(1), rtol=1e-5)
    assert [len(one["cells"]) for one in data["moments"]] == [3, 3, 3, 3]
    assert [one["step"] for one in data["extremes"]] == [0, 12]
    assert data["notes"] == [
        "Each point of a curve is the mean of 3 iterations.",
        "Pictures of 3 of 4 prompts are shown.",
        "Best and worst images of 2 of 4 evaluations are shown.",
    ]


def test_a_grid_that_does_not_say_where_its_pictures_are_is_shown_whole(run):
    """Runs of earlier versions wrote such grids."""
    sheet = Image.open(run / "pictures" / "000004.png").convert("RGB")
    sheet.save(run / "pictures" / "000004.png")
    moment = shown(run)["moments"][1]
    assert moment["cells"] == []
    assert moment["sheet"].startswith("data:image/webp;base64,")


def test_small_pictures_stay_exact_and_large_ones_become_small():
    rng = np.random.default_rng(0)
    assert encode(rng.integers(0, 256, (96, 64, 3), dtype=np.uint8)).startswith("data:image/png;base64,")
    large = encode(rng.integers(0, 256, (1024, 512, 3), dtype=np.uint8))
    assert large.startswith("data:image/webp;base64,")
    assert len(large) < 60_000


def test_runs_are_named_by_as_much_of_their_path_as_tells_them_apart(whole):
    run = read_run(whole)
    paths = [Path("/a/x/run"), Path("/a/y/run"), Path("/a/y/other")]
    assert names_of([replace(run, path=path) for path in paths]) == ["x/run", "y/run", "y/other"]
    assert names_of([replace(run, path=path) for path in paths[1:]]) == ["run", "other"]
    same = names_of([run, run])
    assert len(set(same)) == 2


def test_texts_of_a_run_cannot_leave_the_data(whole):
    text = page(report_data([read_run(whole)]), "<title> & {{data}}")
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    assert "<title>&lt;title&gt; &amp; {{data}}</title>" in text
    values = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(values)["runs"][0]["moments"][0]["cells"][2]["caption"] == PROMPTS[2]


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("metrics.jsonl", "{broken", "line 13 is not JSON"),
        ("metrics.jsonl", "[13]", "line 13 is a list, not an object"),
        ("metrics.jsonl", '{"step": "13"}', "line 13 has the step '13', not a whole number"),
        ("metrics.jsonl", '{"reward": 1}', "line 13 has the step None"),
        ("metrics.jsonl", '{"step": 12}', "line 13 has step 12 after step 12"),
        ("metrics.jsonl", "\x00\x00", "line 13 is not JSON"),
        ("evaluations.jsonl", '{"step": 9, "tags": {"colors": 1}}', "line 4 has tags that are not objects of scores"),
    ],
)
def test_a_damaged_line_is_named(run, capsys, file, line, says):
    append(run / file, f"{line}\n")
    assert main([str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{run / file}: {says}" in said
    assert "remove the line" in said
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "3", "config.json holds a number, not an object"),
        ("environment.json", '{"starts": 3}', "environment.json: starts is a number, not a list"),
        ("summary.json", "{}", "summary.json has no by_steps"),
        ("summary.json", '{"iterations": 12, "by_steps": {"10": {"base": {}}}}', "summary.json has no by_steps"),
        ("pictures/000004.png", "no picture", "000004.png is damaged"),
        ("before_after.png", "", "before_after.png is damaged"),
        ("extremes/000008.png", "", "000008.png is damaged"),
    ],
)
def test_a_damaged_file_is_named(run, capsys, file, text, says):
    (run / file).write_text(text)
    assert main([str(run)]) == 2
    assert says in capsys.readouterr().err


def test_a_picture_cut_short_is_damaged(run, capsys):
    picture = run / "pictures" / "000008.png"
    picture.write_bytes(picture.read_bytes()[:-300])
    assert main([str(run)]) == 2
    assert "000008.png is damaged" in capsys.readouterr().err


def test_all_folders_that_are_no_run_are_named_at_once(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (run / "config.json").write_text("[]")
    assert (
        main([str(tmp_path / "nowhere"), str(tmp_path / "empty"), str(run), "--output", str(tmp_path / "x.html")]) == 2
    )
    said = capsys.readouterr().err
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in said
    assert f"{tmp_path / 'empty'} is not a training run" in said
    assert "config.json holds a list" in said


def test_only_an_html_file_is_written(run, tmp_path, capsys):
    target = run / "metrics.jsonl"
    before = target.read_bytes()
    assert main([str(run), "--output", str(target)]) == 2
    assert "ends in .html" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert main([str(run), "--output", str(tmp_path / "new" / "r.html")]) == 0
    assert (tmp_path / "new" / "r.html").stat().st_size > 20_000


def test_without_output_several_runs_are_reported_here(run, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(run), str(whole)]) == 0
    assert (tmp_path / "report.html").exists()
