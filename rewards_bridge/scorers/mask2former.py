"""GenEval's object detector: Mask2Former of transformers, fed and read as mmdetection does it.

    detector = load_detector("mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth")
    for found in detector.detect(images):  # u8[B,H,W,3], RGB
        found  # {class: [{"box": [x0, y0, x1, y1], "score": float, "mask": bool[H,W]}]}

What is fed: the image at the largest size that fits in 1333x800 with its proportions kept, resized with OpenCV's
arithmetic, padded with grey. What is read: the best 100 pairs of query and class, so that one query may be two things
and masks may overlap; transformers' own post_process_instance_segmentation gives each pixel to one thing at most and
would change counts. These numbers decide which objects are above a threshold, so they are not to be improved.

Source: Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation", as in mmdetection 2.x.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.mask2former_sizes import swin_small_coco
from rewards_bridge.scorers.mask2former_weights import SUFFIXES, from_hub, load_mmdetection
from rewards_bridge.scorers.rubric import SCORE_THRESHOLD
from rewards_bridge.scorers.torch_models import Mask2FormerForUniversalSegmentation

# GenEval's names of COCO's 80 classes, in COCO's order. COCO's own "mouse", "remote" and "keyboard" are ambiguous.
CLASSES: tuple[str, ...] = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}
"""What COCO, and checkpoints with other labels of its classes, call them -> GenEval's name."""

LONG_SIDE, SHORT_SIDE = 1333, 800  # pixels
MULTIPLE = 32  # of which both sides of what the model is given are
PADDING = 128  # grey level
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # grey levels, RGB
MAX_PER_IMAGE = 100

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Mask2Former:
    """Finds the objects in images, a micro-batch at a time.

    classes: the model's classes by index; batch_size: images at a time; min_score: detections at or below it are left
    out; max_per_image: how many pairs of query and class are looked at; sides: as in prepare(). A micro-batch that does
    not fit in memory is halved, for good.
    """

    def __init__(
        self,
        model: Mask2FormerForUniversalSegmentation,
        classes: Sequence[str] = CLASSES,
        batch_size: int = 8,
        min_score: float = SCORE_THRESHOLD,
        max_per_image: int = MAX_PER_IMAGE,
        sides: tuple[int, int] = (LONG_SIDE, SHORT_SIDE),
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; wanted at least 1 image at a time")
        self.model = model.eval()
        self.classes = tuple(classes)
        self.batch_size = batch_size
        self.min_score = min_score
        self.max_per_image = max_per_image
        self.sides = sides

    def detect(self, images: np.ndarray) -> Iterator[dict[str, list[dict[str, Any]]]]:
        """Yield what is in each image u8[B,H,W,3] (RGB): {class: [{"box", "score", "mask"}]}, best first.

        A box is [x0, y0, x1, y1] in pixels of the image, the last ones excluded; a mask bool[H,W]; a score 0..1.
        Raises torch.OutOfMemoryError if not even one image fits.
        """
        start = 0
        while start < len(images):
            found = self._detect_or_halve(images[start : start + self.batch_size])
            yield from found
            start += len(found)

    def _detect_or_halve(self, images: np.ndarray) -> list[dict[str, list[dict[str, Any]]]]:
        try:
            return self._detect(images)
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                error.add_note(f"one image of {images.shape[1]}x{images.shape[2]} pixels does not fit in memory")
                raise
            self.batch_size = len(images) // 2
        torch.cuda.empty_cache()  # out of the except clause: the error holds what did not fit
        return []

    @torch.inference_mode()
    def _detect(self, images: np.ndarray) -> list[dict[str, list[dict[str, Any]]]]:
        device, dtype = self.model.device, self.model.dtype
        pixels, resized = prepare(torch.from_numpy(np.ascontiguousarray(images)).to(device), self.sides)
        output = self.model(pixel_values=pixels.to(dtype))
        sizes = Sizes((pixels.shape[2], pixels.shape[3]), resized, (images.shape[1], images.shape[2]))
        return [
            self._by_class(read_instances(class_logits, mask_logits, sizes, self.min_score, self.max_per_image))
            for class_logits, mask_logits in zip(
                output.class_queries_logits.float(), output.masks_queries_logits.float(), strict=True
            )
        ]

    def _by_class(self, instances: Instances) -> dict[str, list[dict[str, Any]]]:
        labels, scores = instances.labels.tolist(), instances.scores.tolist()
        boxes, masks = instances.boxes.tolist(), instances.masks.cpu().numpy()
        found: dict[str, list[dict[str, Any]]] = {}
        for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
            detection = {"box": boxes[index], "score": scores[index], "mask": masks[index]}
            found.setdefault(self.classes[labels[index]], []).append(detection)
        return found


# ---------------------------------------------------------------- what the model is given


def prepare(images: Tensor, sides: tuple[int, int] = (LONG_SIDE, SHORT_SIDE)) -> tuple[Tensor, tuple[int, int]]:
    """Return f32[B,3,h,w] as the model wants images u8[B,H,W,3] (RGB), and their size (height, width) before padding.

    sides: what the longer and the shorter side may have, in pixels; the result is as large as fits in both.
    """
    height, width = images.shape[1:3]
    scale = min(sides[0] / max(height, width), sides[1] / min(height, width))
    resized = (int(height * scale + 0.5), int(width * scale + 0.5))
    levels = resize(images, *resized)
    down, right = (-side % MULTIPLE for side in resized)
    padded = functional.pad(levels, (0, right, 0, down), value=PADDING)  # grey before it is normalised
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (padded.float() - mean) / std, resized


_BITS = 11  # of the weights


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Return u8[B,3,height,width] from images u8[B,H,W,3], bilinear, bit for bit as OpenCV's INTER_LINEAR.

    Its weights are whole numbers of 11 bits, and it drops 4 and then 16 bits of the products on the way; others
    differ from it by a grey level in one pixel of eight. OpenCV itself would be another dependency of this judge (its
    wheels, of which paddleocr brings one, overwrite each other) and would work on one image at a time on the CPU.
    """
    source = images.permute(0, 3, 1, 2).int()
    left, right, from_left, from_right = (tap.to(images.device) for tap in _taps(source.shape[3], width, inside=True))
    rows = (source[..., left] * from_left + source[..., right] * from_right) >> 4
    above, below, from_above, from_below = (tap.to(images.device) for tap in _taps(source.shape[2], height))
    upper = (rows[..., above, :] * from_above[:, None]) >> 16
    lower = (rows[..., below, :] * from_below[:, None]) >> 16
    return ((upper + lower + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _taps(count: int, wanted: int, inside: bool = False) -> tuple[Tensor, ...]:
    """Which two of `count` samples make each of `wanted`, i64[wanted] each, and their weights, i32[wanted] each.

    inside: samples beyond the first and the last get no weight. Without it they get some and stand for the outermost
    one, which only rounds otherwise: OpenCV treats columns the one way and rows the other.
    """
    at = ((np.arange(wanted) + 0.5) * (1 / (wanted / count)) - 0.5).astype(np.float32)
    first = np.floor(at)
    share = at - first
    if inside:
        share[(first < 0) | (first >= count - 1)] = 0
    weights = (np.rint(weight * np.float32(1 << _BITS)).astype(np.int32) for weight in (np.float32(1) - share, share))
    taps = (np.clip(first + offset, 0, count - 1).astype(np.int64) for offset in (0, 1))
    return tuple(torch.from_numpy(array) for array in (*taps, *weights))


# ---------------------------------------------------------------- what the model says


class Sizes(NamedTuple):
    """(height, width) in pixels: what the model was given, that without padding, and the image itself."""

    padded: tuple[int, int]
    resized: tuple[int, int]
    image: tuple[int, int]


class Instances(NamedTuple):
    """n objects of one image: labels i64[n], scores f32[n], boxes f32[n,4] (x0, y0, x1, y1), masks bool[n,H,W]."""

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor


def read_instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    sizes: Sizes,
    min_score: float = SCORE_THRESHOLD,
    max_per_image: int = MAX_PER_IMAGE,
) -> Instances:
    """Return the objects that the logits of one image stand for, those with a score above min_score, in no order.

    class_logits f32[Q,C+1], "no object" last; mask_logits f32[Q,h,w] of any size. The best max_per_image pairs of query
    and class are taken; a score is the class's probability times the mean probability of the mask's pixels.
    """
    chances = class_logits.softmax(-1)[:, :-1]
    chance, pair = chances.flatten().topk(min(max_per_image, chances.numel()), sorted=False)
    chance, pair = chance[chance > min_score], pair[chance > min_score]  # no score is above its class's probability
    queries, labels = pair // chances.shape[1], pair % chances.shape[1]

    logits = _stretch(mask_logits[queries], sizes.padded)[:, : sizes.resized[0], : sizes.resized[1]]
    logits = _stretch(logits, sizes.image)
    masks = logits > 0
    certainty = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores = chance * certainty
    kept = scores > min_score
    masks = masks[kept]
    return Instances(labels[kept], scores[kept], boxes_of(masks), masks)


def _stretch(masks: Tensor, size: tuple[int, int]) -> Tensor:
    if not len(masks):
        return masks.new_zeros(0, *size)
    return functional.interpolate(masks[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def boxes_of(masks: Tensor) -> Tensor:
    """Return the boxes f32[n,4] (x0, y0, x1, y1) around masks bool[n,H,W], last index + 1; zeros for an empty mask."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for index, mask in enumerate(masks):
        xs, ys = mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]
        if len(xs):
            boxes[index] = torch.stack([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
    return boxes


# ---------------------------------------------------------------- loading


def load_detector(
    checkpoint: str, device: str = "auto", dtype: str = "float32", batch_size: int = 8, any_size: bool = False
) -> Mask2Former:
    """Return the detector of an mmdetection file (.pth, .pt, .safetensors) or of a Hugging Face folder or Hub name.

    device: "auto" is the first GPU if there is one; dtype: a name of DTYPES; any_size: take an mmdetection file of any
    size, not only the benchmark's Swin-S. Raises UsageError if something of it cannot be had or the model does not tell
    COCO's classes.
    """
    place = choose_device(device)
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; wanted one of {', '.join(DTYPES)}")
    model: Any
    if checkpoint.endswith(SUFFIXES) and not Path(checkpoint).is_dir():
        model, classes = load_mmdetection(checkpoint, None if any_size else swin_small_coco()), CLASSES
    else:
        model = from_hub(Mask2FormerForUniversalSegmentation, checkpoint, "GenEval's detector")
        classes = class_names(checkpoint, model.config.id2label)
    return Mask2Former(model.to(place, DTYPES[dtype]), classes, batch_size)


def choose_device(device: str) -> torch.device:
    """Return the device of this name, or for "auto" the first GPU, else the CPU; raises UsageError if there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device is {device!r}; wanted auto, cpu, cuda or cuda:N ({error})") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {device!r}, but torch sees {torch.cuda.device_count()} GPU(s); take auto or cpu")
    return place


def class_names(name: str, labels: Mapping[int, str]) -> tuple[str, ...]:
    """Return GenEval's names of a model's labels by index; raises UsageError unless they are COCO's 80 classes.

    Labels that are only numbered, "LABEL_0" and so on, are taken to be in COCO's order.
    """
    found = tuple(labels[index].lower() for index in sorted(labels))
    if found == tuple(f"label_{index}" for index in range(len(CLASSES))):
        return CLASSES
    classes = tuple(ALIASES.get(label, label) for label in found)
    if sorted(classes) != sorted(CLASSES):
        surplus, lacking = sorted({*classes} - {*CLASSES}), sorted({*CLASSES} - {*classes})
        raise UsageError(
            f"{name}: its {len(classes)} labels are not COCO's {len(CLASSES)} classes; unknown: "
            f"{', '.join(surplus) or 'none'}; lacking: {', '.join(lacking) or 'none'}; take a COCO instance checkpoint"
        )
    return classes
