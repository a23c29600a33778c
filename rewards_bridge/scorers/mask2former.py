"""GenEval's object detector: the Mask2Former of transformers with the pre- and post-processing of mmdetection.

    detector = load_detector("mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth")
    for detections in detector.detect(images):  # u8[B,H,W,3], RGB
        detections  # {class: [{"box": [x0, y0, x1, y1], "score": float, "mask": bool[H,W]}]}

Input: the image at the largest size that fits in 1333x800 with its aspect ratio kept, resized with OpenCV's arithmetic
and padded with grey. Output: the best 100 pairs of query and class, so that one query may be two objects and masks may
overlap; transformers' own post_process_instance_segmentation assigns each pixel to at most one object and would change
counts. These numbers decide which objects are above a threshold, so do not "improve" them.

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

# GenEval's names for COCO's 80 classes, in COCO's order. COCO's own "mouse", "remote" and "keyboard" are ambiguous.
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
"""Names in COCO, and in checkpoints with other labels for its classes -> GenEval's name."""

LONG_SIDE, SHORT_SIDE = 1333, 800  # pixels
MULTIPLE = 32  # both sides of the model's input are multiples of this
PADDING = 128  # grey level
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # grey levels, RGB
MAX_PER_IMAGE = 100

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Mask2Former:
    """Detects the objects in images, one micro-batch at a time.

    classes: the model's classes by index; batch_size: images per micro-batch; min_score: detections at or below it are
    dropped; max_per_image: number of pairs of query and class to consider; sides: as in prepare(). If a micro-batch
    does not fit in memory, the batch size is halved permanently.
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
            raise UsageError(f"batch_size is {batch_size}; expected at least 1")
        self.model = model.eval()
        self.classes = tuple(classes)
        self.batch_size = batch_size
        self.min_score = min_score
        self.max_per_image = max_per_image
        self.sides = sides

    def detect(self, images: np.ndarray) -> Iterator[dict[str, list[dict[str, Any]]]]:
        """Yield the objects in each image u8[B,H,W,3] (RGB): {class: [{"box", "score", "mask"}]}, best first.

        A box is [x0, y0, x1, y1] in pixels of the image, x1 and y1 excluded; a mask is bool[H,W]; a score is 0..1.
        Raises torch.OutOfMemoryError if not even one image fits.
        """
        start = 0
        while start < len(images):
            results = self._detect_or_halve(images[start : start + self.batch_size])
            yield from results
            start += len(results)

    def _detect_or_halve(self, images: np.ndarray) -> list[dict[str, list[dict[str, Any]]]]:
        try:
            return self._detect(images)
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                error.add_note(f"one image of {images.shape[1]}x{images.shape[2]} pixels does not fit in memory")
                raise
            self.batch_size = len(images) // 2
        torch.cuda.empty_cache()  # outside the except clause, because the error keeps the failed tensors alive
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
        detections: dict[str, list[dict[str, Any]]] = {}
        for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
            detection = {"box": boxes[index], "score": scores[index], "mask": masks[index]}
            detections.setdefault(self.classes[labels[index]], []).append(detection)
        return detections


# ---------------------------------------------------------------- input of the model


def prepare(images: Tensor, sides: tuple[int, int] = (LONG_SIDE, SHORT_SIDE)) -> tuple[Tensor, tuple[int, int]]:
    """Return the model's input f32[B,3,h,w] for images u8[B,H,W,3] (RGB), and its size (height, width) before padding.

    sides: maximum pixels of the longer and of the shorter side; the result is as large as both allow.
    """
    height, width = images.shape[1:3]
    scale = min(sides[0] / max(height, width), sides[1] / min(height, width))
    resized = (int(height * scale + 0.5), int(width * scale + 0.5))
    levels = resize(images, *resized)
    down, right = (-side % MULTIPLE for side in resized)
    padded = functional.pad(levels, (0, right, 0, down), value=PADDING)  # grey before normalisation
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (padded.float() - mean) / std, resized


_BITS = 11  # of the weights


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Return u8[B,3,height,width] from images u8[B,H,W,3], bilinear, bit-identical to OpenCV's INTER_LINEAR.

    OpenCV uses integer weights of 11 bits and drops 4 and then 16 bits of the products; other implementations differ
    from it by a grey level in one pixel of eight. OpenCV itself would be one more dependency of this scorer (its
    wheels, one of which paddleocr brings, overwrite each other) and would process one image at a time on the CPU.
    """
    source = images.permute(0, 3, 1, 2).int()
    left, right, from_left, from_right = (tap.to(images.device) for tap in _taps(source.shape[3], width, inside=True))
    rows = (source[..., left] * from_left + source[..., right] * from_right) >> 4
    above, below, from_above, from_below = (tap.to(images.device) for tap in _taps(source.shape[2], height))
    upper = (rows[..., above, :] * from_above[:, None]) >> 16
    lower = (rows[..., below, :] * from_below[:, None]) >> 16
    return ((upper + lower + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _taps(count: int, target: int, inside: bool = False) -> tuple[Tensor, ...]:
    """Return which two of `count` samples make each of `target`, i64[target] each, and their weights, i32[target] each.

    inside: samples beyond the first and the last get no weight. Otherwise they do and are replaced by the outermost
    sample, which only changes the rounding: OpenCV treats columns the one way and rows the other.
    """
    at = ((np.arange(target) + 0.5) * (1 / (target / count)) - 0.5).astype(np.float32)
    first = np.floor(at)
    share = at - first
    if inside:
        share[(first < 0) | (first >= count - 1)] = 0
    weights = (np.rint(weight * np.float32(1 << _BITS)).astype(np.int32) for weight in (np.float32(1) - share, share))
    taps = (np.clip(first + offset, 0, count - 1).astype(np.int64) for offset in (0, 1))
    return tuple(torch.from_numpy(array) for array in (*taps, *weights))


# ---------------------------------------------------------------- output of the model


class Sizes(NamedTuple):
    """(height, width) in pixels of the model's input, of the input without padding, and of the original image."""

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
    """Return the objects in one image with a score above min_score, unordered.

    class_logits f32[Q,C+1], "no object" last; mask_logits f32[Q,h,w] of any size. Considers the best max_per_image
    pairs of query and class; a score is the class's probability times the mean probability of the mask's pixels.
    """
    chances = class_logits.softmax(-1)[:, :-1]
    chance, pair = chances.flatten().topk(min(max_per_image, chances.numel()), sorted=False)
    chance, pair = chance[chance > min_score], pair[chance > min_score]  # a score never exceeds its class's probability
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
    """Return the boxes f32[n,4] (x0, y0, last x + 1, last y + 1) around masks bool[n,H,W]; zeros for an empty mask."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for index, mask in enumerate(masks):
        xs, ys = mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]
        if len(xs):
            boxes[index] = torch.stack([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
    return boxes


# ---------------------------------------------------------------- loading


def load_detector(
    source: str, device: str = "auto", dtype: str = "float32", batch_size: int = 8, any_size: bool = False
) -> Mask2Former:
    """Load the detector from an mmdetection file (.pth, .pt, .safetensors), a Hugging Face folder or a Hub name.

    device: "auto" is the first GPU if there is one; dtype: a name of DTYPES; any_size: accept an mmdetection file of
    any size, not only the benchmark's Swin-S. Raises UsageError for an invalid argument, for files that cannot be
    loaded, and for a model without COCO's classes.
    """
    torch_device = choose_device(device)
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    model: Any
    if source.endswith(SUFFIXES) and not Path(source).is_dir():
        model, classes = load_mmdetection(source, None if any_size else swin_small_coco()), CLASSES
    else:
        model = from_hub(Mask2FormerForUniversalSegmentation, source, "GenEval's detector")
        classes = class_names(source, model.config.id2label)
    return Mask2Former(model.to(torch_device, DTYPES[dtype]), classes, batch_size)


def choose_device(device: str) -> torch.device:
    """Return the device of this name; "auto" is the first GPU or else the CPU. UsageError if it does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N ({error})") from None
    if torch_device.type == "cuda" and (torch_device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {device!r}, but torch sees {torch.cuda.device_count()} GPU(s); use auto or cpu")
    return torch_device


def class_names(name: str, labels: Mapping[int, str]) -> tuple[str, ...]:
    """Return GenEval's names of a model's labels by index; raises UsageError unless they are COCO's 80 classes.

    Labels that are only numbers ("LABEL_0", ...) are assumed to be in COCO's order.
    """
    names = tuple(labels[index].lower() for index in sorted(labels))
    if names == tuple(f"label_{index}" for index in range(len(CLASSES))):
        return CLASSES
    classes = tuple(ALIASES.get(label, label) for label in names)
    if sorted(classes) != sorted(CLASSES):
        surplus, lacking = sorted({*classes} - {*CLASSES}), sorted({*CLASSES} - {*classes})
        raise UsageError(
            f"{name}: its {len(classes)} labels are not COCO's {len(CLASSES)} classes; unknown: "
            f"{', '.join(surplus) or 'none'}; lacking: {', '.join(lacking) or 'none'}; use a model of COCO instances"
        )
    return classes
