"""Tests of Mask2Former: mmdetection's own outputs for a tiny random model, and each step computed by hand."""

import gzip
import json
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers import mask2former
from rewards_bridge.scorers.mask2former import (
    CLASSES,
    Mask2Former,
    Sizes,
    boxes_of,
    class_names,
    load_detector,
    prepare,
    read_instances,
    resize,
)
from rewards_bridge.scorers.mask2former_sizes import read_sizes, swin_small_coco
from rewards_bridge.scorers.mask2former_weights import UNUSED, convert, load_mmdetection, read_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "mask2former"
CHECKPOINT = str(GOLDEN / "tiny_mmdet.safetensors")
CONFIG = json.loads((GOLDEN / "config.json").read_text())
NAMES = json.loads(gzip.decompress((GOLDEN / "names.json.gz").read_bytes()))
WITHIN = 1e-5
"""Largest difference relative to the largest value; mmdetection itself in float64 differs by 1.5e-6."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on models this small, several threads only wait for each other, for minutes on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "expected.npz") as archive:
        return dict(archive)


def tiny_config() -> Mask2FormerConfig:
    return Mask2FormerConfig(**CONFIG["transformers"])


@pytest.fixture(scope="module")
def model() -> Mask2FormerForUniversalSegmentation:
    return load_mmdetection(CHECKPOINT, tiny_config()).eval()


def all_of(model: Mask2FormerForUniversalSegmentation, batch_size: int = 8) -> Mask2Former:
    """Return a detector that keeps everything, as the golden numbers do."""
    return Mask2Former(model, batch_size=batch_size, min_score=-1, max_per_image=10, sides=(133, 80))


def assert_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    assert tuple(actual.shape) == expected.shape
    assert np.abs(actual.numpy() - expected).max() <= WITHIN * np.abs(expected).max()


# ---------------------------------------------------------------- weights


def test_the_outputs_are_those_of_mmdetection(model, expected) -> None:
    with torch.inference_mode():
        output = model(pixel_values=torch.from_numpy(expected["input"]))
    assert_close(output.class_queries_logits, expected["class_logits"])
    assert_close(output.masks_queries_logits, expected["mask_logits"])


@pytest.mark.parametrize("version", ["2.x", "3.x"])
def test_every_name_of_the_full_checkpoint_is_converted(version) -> None:
    names = NAMES[version]
    assert len(names) == 649
    with torch.device("meta"):
        full = Mask2FormerForUniversalSegmentation(swin_small_coco())
        source = {name: torch.empty(shape) for name, shape in names.items()}
    shapes = {name: tensor.shape for name, tensor in full.state_dict().items()}
    converted = convert(source, shapes)
    assert {name: converted[name].shape for name in converted} == {name: shapes[name] for name in converted}
    assert all(any(unused.fullmatch(name) for unused in UNUSED) for name in shapes.keys() - converted.keys())
    assert len(shapes) - len(converted) == 3
    indexes = sum("relative_position_index" in name for name in names)
    packed = sum(".qkv." in name for name in names) + sum(
        ".in_proj_" in name and ("attentions.1" in name or ".self_attn." in name) for name in names
    )
    assert len(converted) == 649 - indexes + 2 * packed  # three for one


def test_names_of_3x_give_the_same_weights() -> None:
    source = load_file(CHECKPOINT)
    newer = {}
    for name, tensor in source.items():
        new = name
        if ".pixel_decoder.encoder." in name:
            new = name.replace("attentions.0", "self_attn").replace("ffns.0", "ffn")
        elif ".transformer_decoder." in name:
            new = name.replace("attentions.0", "cross_attn").replace("attentions.1", "self_attn")
            new = new.replace("ffns.0", "ffn")
        newer[new] = tensor
    assert len(newer.keys() - source.keys()) == 60  # 2 layers of 12 and 3 of 12
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in Mask2FormerForUniversalSegmentation(tiny_config()).state_dict().items()
        }
    from_2x, from_3x = convert(source, shapes), convert(newer, shapes)
    assert from_2x.keys() == from_3x.keys()
    assert all(torch.equal(from_3x[name], tensor) for name, tensor in from_2x.items())


def test_everything_that_does_not_fit_is_reported_at_once() -> None:
    source = load_file(CHECKPOINT)
    source["neck.conv.weight"] = torch.zeros(2, 3)
    source["panoptic_head.cls_embed.bias"] = torch.zeros(134)
    source["backbone.stages.0.downsample.norm.weight"] = torch.zeros(63)
    source["backbone.stages.0.blocks.0.attn.w_msa.qkv.bias"] = torch.zeros(())
    source["backbone.stages.1.blocks.2.norm1.bias"] = torch.zeros(32)  # there is no third block
    del source["panoptic_head.query_feat.weight"]
    double = "panoptic_head.transformer_decoder.layers.0.ffn.layers.1.bias"
    source[double] = source[double.replace("ffn", "ffns.0")]
    model = Mask2FormerForUniversalSegmentation(tiny_config())
    with pytest.raises(UsageError) as caught:
        convert(source, {name: tensor.shape for name, tensor in model.state_dict().items()})
    lines = str(caught.value).splitlines()
    swin = "model.pixel_level_module.encoder.swin.encoder.layers.0."
    target = "model.transformer_module.decoder.layers.0.fc2.bias"
    assert "9 problem(s)" in lines[0]
    assert sorted(line.strip() for line in lines[1:]) == sorted(
        [
            "left over: neck.conv.weight [2, 3]",
            "left over: backbone.stages.1.blocks.2.norm1.bias [32]",
            "missing: model.transformer_module.queries_features.weight [10, 64]",
            f"twice: {double} and {double.replace('ffn', 'ffns.0')} are both {target}",
            "wrong shape: class_predictor.bias (from panoptic_head.cls_embed.bias) has [134], expected [81]",
            f"wrong shape: {swin}downsample.norm.weight (from backbone.stages.0.downsample.norm.weight) "
            "has [63], expected [64]",
            *(
                f"wrong shape: {swin}blocks.0.attention.{letter}_proj.bias "
                "(from backbone.stages.0.blocks.0.attn.w_msa.qkv.bias) has [], expected [16]"
                for letter in "qkv"
            ),
        ]
    )


# ---------------------------------------------------------------- files


def test_pytorch_files_are_read(tmp_path) -> None:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3)}
    meta = {"CLASSES": ("person", "dog"), "config": "text", "epoch": 50, "best": np.float64(0.46), "n": np.int64(3)}
    for index, content in enumerate([weights, {"meta": meta, "state_dict": weights}]):
        path = tmp_path / f"{index}.pth"
        torch.save(content, path)
        assert torch.equal(read_checkpoint(str(path))["a.weight"], weights["a.weight"])


def test_a_file_with_objects_is_not_loaded_and_the_command_rewrites_it(tmp_path) -> None:
    path = tmp_path / "it's.pth"
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3).T}
    torch.save({"message_hub": types.SimpleNamespace(log=1), "state_dict": weights}, path)
    with pytest.raises(UsageError, match="contains more than tensors") as caught:
        read_checkpoint(str(path))
    program, *arguments = shlex.split(str(caught.value).splitlines()[-1])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    assert torch.equal(read_checkpoint(str(tmp_path / "it's.safetensors"))["a.weight"], weights["a.weight"])


def test_files_that_cannot_be_read_are_named(tmp_path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(Path(CHECKPOINT).read_bytes()[:1000])
    torch.save(torch.zeros(3), tmp_path / "bare.pth")
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:300])
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    for name, message in [
        ("none.pth", "no such file"),
        ("cut.safetensors", "download it again"),
        ("cut.pth", "download it again"),
        ("page.pth", "download it again"),
        ("bare.pth", "expected a state dict"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            load_detector(str(tmp_path / name), device="cpu")
        assert name in str(caught.value)


# ---------------------------------------------------------------- input of the model


def test_the_golden_image_is_prepared_as_by_mmdetection(expected) -> None:
    image = np.ascontiguousarray(expected["image_bgr_u8"][None, ..., ::-1])
    pixels, resized = prepare(torch.from_numpy(image), sides=(133, 80))
    assert resized == (80, 108)
    np.testing.assert_allclose(pixels.numpy(), expected["input"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", range(7))
def test_resizing_is_that_of_opencv_to_the_bit(index, expected) -> None:
    source, target = expected[f"resize{index}_from"], expected[f"resize{index}_to"]
    resized = resize(torch.from_numpy(source[None]), *target.shape[:2])
    np.testing.assert_array_equal(resized[0].permute(1, 2, 0).numpy(), target)


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((800, 800), (800, 800), (800, 800)),
        ((768, 512), (1200, 800), (1216, 800)),
        ((512, 768), (800, 1200), (800, 1216)),
        ((300, 700), (571, 1333), (576, 1344)),
        ((32, 256), (167, 1333), (192, 1344)),
    ],
)
def test_sizes(size, resized, padded) -> None:
    pixels, unpadded = prepare(torch.full((1, *size, 3), 255, dtype=torch.uint8))
    assert unpadded == resized
    assert tuple(pixels.shape) == (1, 3, *padded)
    white, grey = (torch.tensor([(level - 123.675) / 58.395 for level in (255, 128)])).tolist()
    assert pixels[0, 0, : resized[0], : resized[1]].unique().tolist() == pytest.approx([white])
    assert pixels[0, 0, resized[0] :].unique().tolist() == pytest.approx([grey] * (padded[0] > resized[0]))
    assert pixels[0, 0, :, resized[1] :].unique().tolist() == pytest.approx([grey] * (padded[1] > resized[1]))


def test_channels_are_red_green_blue() -> None:
    image = torch.tensor([10, 100, 200], dtype=torch.uint8).expand(1, 32, 32, 3)
    pixels, _ = prepare(image, sides=(32, 32))
    normalised = [(10 - 123.675) / 58.395, (100 - 116.28) / 57.12, (200 - 103.53) / 57.375]
    assert pixels[0, :, 5, 5].tolist() == pytest.approx(normalised)


# ---------------------------------------------------------------- output of the model

PLAIN = Sizes((8, 8), (8, 8), (8, 8))


def logits_of(*chances: tuple[float, ...]) -> torch.Tensor:
    """Return logits whose softmax is these probabilities; the last one is "no object"."""
    return torch.tensor(chances).log()


def mask_of(rows: slice, columns: slice, inside: float = 20.0, side: int = 8) -> torch.Tensor:
    logits = torch.full((side, side), -20.0)
    logits[rows, columns] = inside
    return logits


def test_the_last_class_is_no_object() -> None:
    masks = mask_of(slice(2, 5), slice(1, 7)).expand(1, 8, 8)
    instances = read_instances(logits_of((0.1, 0.3, 0.6)), masks, PLAIN, min_score=0.2)
    assert instances.labels.tolist() == [1]
    assert instances.scores.tolist() == pytest.approx([0.3])


def test_one_query_may_be_two_objects_and_the_best_pairs_are_taken() -> None:
    masks = torch.stack([mask_of(slice(0, 4), slice(0, 4)), mask_of(slice(4, 8), slice(4, 8))])
    logits = logits_of((0.45, 0.40, 0.15), (0.2, 0.35, 0.45))
    columns = read_instances(logits, masks, PLAIN, min_score=0, max_per_image=3)[:3]  # labels, scores, boxes
    labels, scores, boxes = (column.tolist() for column in columns)
    seen = sorted(zip(scores, labels, boxes, strict=True), reverse=True)
    assert [score for score, _, _ in seen] == pytest.approx([0.45, 0.40, 0.35])
    assert [(label, box) for _, label, box in seen] == [(0, [0, 0, 4, 4]), (1, [0, 0, 4, 4]), (1, [4, 4, 8, 8])]


def test_masks_may_overlap() -> None:
    masks = torch.stack([mask_of(slice(0, 8), slice(0, 8)), mask_of(slice(2, 4), slice(2, 4))])
    instances = read_instances(logits_of((0.9, 0.1), (0.8, 0.2)), masks, PLAIN)
    assert sorted(instances.masks.flatten(1).sum(1).tolist()) == [4, 64]


def test_a_score_is_the_chance_times_the_mean_certainty_of_the_mask() -> None:
    mask = mask_of(slice(0, 2), slice(0, 2))
    mask[0, 0] = mask[0, 1] = float(torch.logit(torch.tensor(0.6)))
    instances = read_instances(logits_of((0.5, 0.5)), mask[None], PLAIN)
    assert instances.scores.tolist() == pytest.approx([0.5 * (0.6 + 0.6 + 1 + 1) / 4], rel=1e-6)


def test_a_mask_is_what_is_above_zero() -> None:
    mask = mask_of(slice(0, 2), slice(0, 2), inside=1e-3)
    mask[4:6, 4:6] = 0.0
    (binary,) = read_instances(logits_of((0.9, 0.1)), mask[None], PLAIN).masks
    assert binary[:2, :2].all()
    assert binary.sum() == 4


def test_scores_at_the_threshold_are_left_out() -> None:
    masks, logits = mask_of(slice(0, 4), slice(0, 4)).expand(1, 8, 8), logits_of((0.25, 0.75))
    (score,) = read_instances(logits, masks, PLAIN, min_score=0.2).scores.tolist()
    assert len(read_instances(logits, masks, PLAIN, min_score=score).scores) == 0
    assert len(read_instances(logits, masks, PLAIN, min_score=score - 1e-6).scores) == 1


def test_an_empty_mask_scores_nothing() -> None:
    nothing = torch.full((1, 8, 8), -1.0)
    instances = read_instances(logits_of((0.9, 0.1)), nothing, PLAIN, min_score=-1)
    assert instances.scores.tolist() == [0]
    assert instances.boxes.tolist() == [[0, 0, 0, 0]]
    assert len(read_instances(logits_of((0.9, 0.1)), nothing, PLAIN, min_score=0).scores) == 0


def test_masks_are_stretched_cropped_and_stretched() -> None:
    """Masks go from 8x8 to the padded 32x64, of which 32x48 are the image, and then to the image's own 16x24."""
    sizes = Sizes((32, 64), (32, 48), (16, 24))
    masks = torch.stack([mask_of(slice(2, 6), slice(0, 3)), mask_of(slice(0, 8), slice(6, 8))])
    instances = read_instances(logits_of((0.9, 0.1), (0.9, 0.1)), masks, sizes)
    assert tuple(instances.masks.shape) == (1, 16, 24)  # the second is entirely in the padding
    assert instances.boxes.tolist() == [[0, 4, 12, 12]]


@pytest.mark.parametrize(("inside", "border"), [(20.0, 16), (60.0, 15)])
def test_stretching_is_bilinear_in_logits(inside, border) -> None:
    """From -20 at 13.5 to 20 at 17.5, zero is at 15.5; from -20 to 60, at 14.5; and the next pixel is above zero."""
    masks = mask_of(slice(0, 8), slice(4, 8), inside=inside)[None]
    instances = read_instances(logits_of((0.9, 0.1)), masks, Sizes((32, 32), (32, 32), (32, 32)))
    assert instances.boxes.tolist() == [[border, 0, 32, 32]]


def test_boxes_end_after_the_last_pixel() -> None:
    masks = torch.zeros(3, 6, 9, dtype=torch.bool)
    masks[0, 2, 3] = masks[1, 0, 0] = masks[1, 5, 8] = True
    assert boxes_of(masks).tolist() == [[3, 2, 4, 3], [0, 0, 9, 6], [0, 0, 0, 0]]


@pytest.mark.parametrize("kind", ["orig", "padded"])
def test_instances_are_those_of_mmdetection(kind, expected) -> None:
    sizes = Sizes((96, 128), (80, 108), (60, 81)) if kind == "orig" else Sizes((96, 128), (96, 128), (96, 128))
    instances = read_instances(
        torch.from_numpy(expected["class_logits"][0]), torch.from_numpy(expected["mask_logits"][0]), sizes, -1, 10
    )
    mine, theirs = np.argsort(instances.scores.numpy()), np.argsort(expected[f"pred_{kind}_scores"])
    assert_close(instances.scores[mine], expected[f"pred_{kind}_scores"][theirs])
    np.testing.assert_array_equal(instances.labels[mine], expected[f"pred_{kind}_labels"][theirs])
    np.testing.assert_array_equal(instances.boxes[mine], expected[f"pred_{kind}_boxes"][theirs])
    shape = expected[f"pred_{kind}_masks_shape"]
    masks = np.unpackbits(expected[f"pred_{kind}_masks_packed"])[: np.prod(shape)].reshape(shape)
    np.testing.assert_array_equal(instances.masks[mine], masks[theirs].astype(bool))


# ---------------------------------------------------------------- the detector


def seen_by(detector: Mask2Former, images: np.ndarray) -> list[list[tuple]]:
    """Return all detections of each image, lowest score first: (score, class, box, mask as bytes)."""
    return [
        sorted(
            (seen["score"], name, tuple(seen["box"]), seen["mask"].tobytes())
            for name, several in detections.items()
            for seen in several
        )
        for detections in detector.detect(images)
    ]


def test_an_image_comes_out_as_from_mmdetection(model, expected) -> None:
    (detections,) = seen_by(all_of(model), expected["image_bgr_u8"][None, ..., ::-1])
    order = np.argsort(expected["pred_orig_scores"])
    assert [seen[0] for seen in detections] == pytest.approx(expected["pred_orig_scores"][order].tolist(), rel=WITHIN)
    assert [seen[1] for seen in detections] == [CLASSES[label] for label in expected["pred_orig_labels"][order]]
    np.testing.assert_array_equal([seen[2] for seen in detections], expected["pred_orig_boxes"][order])
    masks = np.unpackbits(expected["pred_orig_masks_packed"])[: 10 * 60 * 81].reshape(10, 60, 81)[order]
    np.testing.assert_array_equal([np.frombuffer(seen[3], bool).reshape(60, 81) for seen in detections], masks)


def test_detections_are_sorted_and_above_the_threshold(model, expected) -> None:
    detector = Mask2Former(model, min_score=0.2, max_per_image=10, sides=(133, 80))
    (detections,) = detector.detect(expected["image_bgr_u8"][None, ..., ::-1])
    scores = {name: [seen["score"] for seen in several] for name, several in detections.items()}
    assert scores.keys() == {"laptop", "airplane", "giraffe", "apple"}
    assert all(values == sorted(values, reverse=True) and values[-1] > 0.2 for values in scores.values())
    assert sum(map(len, scores.values())) == 9
    mask = detections["laptop"][0]["mask"]
    assert (mask.dtype, mask.shape) == (bool, (60, 81))


def test_batch_size_and_order_change_nothing(model) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 60, 81, 3)).astype(np.uint8)
    images[4] = images[0]
    alone = seen_by(all_of(model, 1), images)
    together = seen_by(all_of(model, 3), images)
    reverse = seen_by(all_of(model, 5), images[::-1])[::-1]
    assert alone[0] == alone[4]
    for other in (together, reverse):
        for mine, yours in zip(alone, other, strict=True):
            assert [seen[0] for seen in mine] == pytest.approx([seen[0] for seen in yours], rel=WITHIN)
            assert [seen[1:] for seen in mine] == [seen[1:] for seen in yours]


class Cramped:
    """A model that fits `room` images into memory and records the size of every batch."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, room: int) -> None:
        self.room = room
        self.batch_sizes: list[int] = []

    def eval(self) -> "Cramped":
        return self

    def __call__(self, pixel_values: torch.Tensor) -> types.SimpleNamespace:
        self.batch_sizes.append(len(pixel_values))
        if len(pixel_values) > self.room:
            raise torch.OutOfMemoryError("no room")
        chances = logits_of((0.9, 0.1)).expand(len(pixel_values), 1, 2)
        masks = pixel_values[:, :1]  # the bright parts
        return types.SimpleNamespace(class_queries_logits=chances, masks_queries_logits=masks)


def test_a_batch_that_does_not_fit_is_halved_for_good() -> None:
    images = np.zeros((9, 32, 32, 3), np.uint8)
    for index, image in enumerate(images):
        image[:, : index + 1] = 255
    model = Cramped(2)
    detector = Mask2Former(model, batch_size=8, sides=(32, 32))  # type: ignore[arg-type]
    detections = list(detector.detect(images))
    assert model.batch_sizes == [8, 4, 2, 2, 2, 2, 1]
    assert [seen["person"][0]["box"] for seen in detections] == [[0, 0, index + 1, 32] for index in range(9)]
    assert detector.batch_size == 2
    assert len(list(detector.detect(images[:2]))) == 2
    assert model.batch_sizes[-1] == 2


def test_one_image_that_does_not_fit_raises() -> None:
    detector = Mask2Former(Cramped(0), batch_size=2, sides=(32, 32))  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError, match="no room") as caught:
        list(detector.detect(np.zeros((3, 32, 40, 3), np.uint8)))
    assert caught.value.__notes__ == ["one image of 32x40 pixels does not fit in memory"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype, monkeypatch, expected) -> None:
    monkeypatch.setattr(mask2former, "swin_small_coco", tiny_config)
    detector = load_detector(CHECKPOINT, "cpu", dtype)
    assert str(detector.model.dtype) == f"torch.{dtype}"
    detector.min_score, detector.sides = -1, (133, 80)
    (detections,) = detector.detect(expected["image_bgr_u8"][None, ..., ::-1])
    assert all(np.isfinite(seen["score"]) for several in detections.values() for seen in several)


# ---------------------------------------------------------------- loading


def test_an_mmdetection_file_and_a_folder_of_it_are_one_detector(tmp_path, monkeypatch, model, expected) -> None:
    monkeypatch.setattr(mask2former, "swin_small_coco", tiny_config)
    model.save_pretrained(tmp_path)
    images = expected["image_bgr_u8"][None, ..., ::-1]
    from_file, from_folder = (load_detector(place, "cpu") for place in (CHECKPOINT, str(tmp_path)))
    assert from_folder.classes == from_file.classes == CLASSES
    for detector in (from_file, from_folder):
        detector.sides = (133, 80)
    assert seen_by(from_file, images) == seen_by(from_folder, images)


def test_another_size_of_model_is_refused() -> None:
    with pytest.raises(UsageError, match="not those of this Mask2Former") as caught:
        load_detector(CHECKPOINT, "cpu")
    text = str(caught.value)
    assert "wrong shape: class_predictor.weight" in text
    assert "missing: model.pixel_level_module.encoder.swin.encoder.layers.2.blocks.17.layernorm_before.bias" in text
    assert len(load_detector(CHECKPOINT, "cpu", any_size=True).model.state_dict()) > 300


@pytest.mark.parametrize("version", ["2.x", "3.x"])
def test_sizes_are_those_of_the_shapes(version) -> None:
    """Sizes are inferred for the benchmark's own checkpoint, from its names and shapes, and for the tiny one."""
    with torch.device("meta"):
        full = {name: torch.empty(shape) for name, shape in NAMES[version].items()}
    assert read_sizes(full).to_dict() == swin_small_coco().to_dict()
    assert read_sizes(load_file(CHECKPOINT)).to_dict() == tiny_config().to_dict()


def test_without_sizes_the_benchmarks_tensors_are_expected(tmp_path) -> None:
    tensors = load_file(CHECKPOINT)
    del tensors["panoptic_head.query_embed.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"missing: model.transformer_module.queries_embedder.weight \[100, 256\]"):
        load_detector(str(tmp_path / "a.safetensors"), "cpu", any_size=True)


def test_a_folder_that_lacks_weights_is_refused(tmp_path, model) -> None:
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["class_predictor.bias"], weights["criterion.empty_weight"]
    weights["class_predictor.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="does not contain all weights") as caught:
        load_detector(str(tmp_path), "cpu")
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "missing: class_predictor.bias",
        "wrong shape: class_predictor.weight has [3, 3], expected [81, 64]",
    ]


def test_what_cannot_be_loaded_is_named(tmp_path) -> None:
    for place in (str(tmp_path), "nobody/has-this-detector"):
        with pytest.raises(UsageError, match="expected a folder with one or its name on the Hugging Face Hub"):
            load_detector(place, "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu9000"}, "expected auto, cpu, cuda"),
        ({"device": "cuda:99"}, r"sees \d+ GPU"),
        ({"device": "cpu", "dtype": "int8"}, "expected one of float32, bfloat16, float16"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        load_detector(CHECKPOINT, **options)


def test_a_batch_of_nothing_is_refused(model) -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        Mask2Former(model, batch_size=0)


def test_the_classes_are_cocos_but_for_three() -> None:
    coco = CONFIG["coco_classes"]
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert {theirs: ours for theirs, ours in zip(coco, CLASSES, strict=True) if theirs != ours} == {
        "mouse": "computer mouse",
        "remote": "tv remote",
        "keyboard": "computer keyboard",
    }


def test_labels_of_other_checkpoints() -> None:
    coco = CONFIG["coco_classes"]
    assert class_names("x", {index: f"LABEL_{index}" for index in range(80)}) == CLASSES
    assert class_names("x", dict(enumerate(coco))) == CLASSES
    backwards = dict(enumerate(reversed(coco)))
    assert class_names("x", backwards) == CLASSES[::-1]
    with pytest.raises(UsageError, match=r"its 133 labels.*unknown: window; lacking: none"):
        class_names("x", dict(enumerate([*coco, *["window"] * 53])))
    with pytest.raises(UsageError, match=r"unknown: none; lacking: dog"):
        class_names("x", dict(enumerate(label for label in coco if label != "dog")))
