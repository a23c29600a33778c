"""A released model as one object, for notebooks, scripts and tests: from prompts to pictures, with every stage between.

from udm_grpo.pipeline import load_pipeline

pipeline = load_pipeline("udm_grpo/assets/ursa-shapes")
pictures = pipeline.generate(["a photo of a red circle"], height=32, width=32)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, UInt8

from udm_grpo import compiled
from udm_grpo.diffusion.path import ProbabilityPath, make_path
from udm_grpo.diffusion.rollout import RolloutPlan
from udm_grpo.files import places
from udm_grpo.files.buckets import local
from udm_grpo.model.execution import Execution
from udm_grpo.model.network import Network
from udm_grpo.released.weights import PathLike, ReleasedModel, load_folder, save_folder

AnyArray = Array | np.ndarray


def load_pipeline(folder: PathLike, dtype: str = "float32", transformer: PathLike | None = None) -> "Pipeline":
    """Read a folder in the released format; `dtype` is that of the parameters and the computation.

    transformer: a file or folder with trained weights to use instead of those in the folder, such as checkpoint-100 of
    the public release. The folder may be in a bucket (gs://...), of which a local copy is kept. Raises WeightsError
    that lists everything that is wrong with the folder, and PlaceError for an address that cannot be used.
    """
    if problem := places.problem("folder", str(folder), supported=True):
        raise places.PlaceError(problem)
    return Pipeline(load_folder(local(str(folder)), dtype, transformer_weights=transformer))


@dataclass(frozen=True)
class Pipeline:
    """A loaded model; V codes, L text tokens, image tokens of `stride` x `stride` pixels."""

    released: ReleasedModel
    execution: Execution = field(default_factory=Execution)
    """How the transformer is computed."""
    compiled: dict[Any, Callable[..., Any]] = field(default_factory=dict, repr=False)
    """Compiled stages, by what they were compiled for."""

    @property
    def stride(self) -> int:
        """Pixels of a token along each axis."""
        return self.released.vq_config.stride

    @property
    def path(self) -> ProbabilityPath:
        """The probability path of the model's scheduler."""
        scheduler = self.released.scheduler
        return make_path(self.released.path_codebook, scheduler.alpha, scheduler.c, scheduler.eps)

    def tokenize(self, prompts: Sequence[str]) -> Int32[np.ndarray, "b l"]:
        """Return L ids per prompt, padded on the left; longer prompts are truncated, and one warning counts them."""
        return self.released.tokenizer(prompts)

    def logits(self, prompt_ids: Int[AnyArray, "b l"], image_ids: Int[AnyArray, "b h w"]) -> Float[Array, "b n v"]:
        """Return float32 logits of the clean code at each of the N = h*w tokens, given noisy ones.

        Raises ValueError for ids out of range or of another rank.
        """
        config = self.released.transformer_config
        prompts = _ids("prompt_ids", prompt_ids, 2, config.lm_vocab_size)
        images = self._image_ids(image_ids)
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts, but {len(images)} images; give one prompt for every image")
        grid = (images.shape[1], images.shape[2])
        run = self._stage(("logits", grid), lambda: compiled.image_logits(self._network(grid)))
        return run(self.released.transformer, prompts, images.reshape(len(images), -1))

    def encode(self, pixels: Float[AnyArray, "b hh ww 3"]) -> Int32[Array, "b h w"]:
        """Return the codes of pixels in [-1, 1]; raises ValueError for sizes that the stride does not divide."""
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or not jnp.issubdtype(pixels.dtype, jnp.floating):
            actual = f"{pixels.dtype}{list(pixels.shape)}"
            raise ValueError(f"pixels is {actual}; expected floats in [-1, 1], [images, height, width, 3]")
        run = self._stage("encode", lambda: compiled.tokenizer_codec(self.released.vq_config)[0])
        return run(self.released.vq, jnp.asarray(pixels, jnp.float32))

    def decode(self, image_ids: Int[AnyArray, "b h w"]) -> Float[Array, "b hh ww 3"]:
        """Return pixels in [-1, 1], float32, of codes; raises ValueError for codes out of range."""
        return jnp.clip(self._pixels(self._image_ids(image_ids)), -1.0, 1.0)

    def generate(
        self,
        prompts: Sequence[str],
        steps: int = 25,
        guidance_scale: float = 1.0,
        seed: int = 0,
        *,
        negative_prompt: str = "",
        height: int,
        width: int,
    ) -> UInt8[np.ndarray, "b hh ww 3"]:
        """Draw one picture per prompt in T = `steps` steps; the same seed draws the same pictures.

        guidance_scale: 1 is CFG-free; above 1, guidance contrasts with the negative prompt, by default the empty one,
        while t < 0.9. height, width: pixels. Raises ValueError for sizes that the stride does not divide, if there is
        no prompt, and for a negative prompt without guidance.
        """
        if not len(prompts):
            raise ValueError("there are no prompts; give at least one")
        grid = self._grid(height, width)
        if steps < 1 or guidance_scale < 1:
            raise ValueError(f"steps is {steps} and guidance_scale {guidance_scale}; both must be at least 1")
        if negative_prompt and guidance_scale == 1:
            raise ValueError("negative_prompt changes nothing without guidance; give a guidance_scale above 1 as well")
        plan = RolloutPlan(steps, self.released.scheduler.shift, guidance_scale)
        run = self._stage((grid, plan), lambda: compiled.free_rollout(self._network(grid), self.path, plan))
        prompt_ids = jnp.asarray(self.tokenize(prompts))
        empty_ids = jnp.asarray(self.released.tokenizer.negative(negative_prompt))
        image_index = jnp.arange(len(prompts), dtype=jnp.int32)
        rolled = run(self.released.transformer, prompt_ids, empty_ids, image_index, jax.random.key(seed))
        return _to_uint8(self._pixels(rolled.clean.reshape(-1, *grid)))

    def save(self, folder: PathLike) -> None:
        """Write the model in the released format; raises what `save_folder` raises."""
        save_folder(self.released, folder)

    def _network(self, grid: tuple[int, int]) -> Network:
        return Network(self.released.transformer_config, grid, self.execution)

    def _pixels(self, image_ids: Int32[Array, "b h w"]) -> Float[Array, "b hh ww 3"]:
        run = self._stage("decode", lambda: compiled.tokenizer_codec(self.released.vq_config)[1])
        return run(self.released.vq, image_ids)

    def _stage(self, what: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        if what not in self.compiled:
            self.compiled[what] = make()
        return self.compiled[what]

    def _image_ids(self, image_ids: Int[AnyArray, "b h w"]) -> Int32[Array, "b h w"]:
        return _ids("image_ids", image_ids, 3, self.released.transformer_config.lm_head_size)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if height < 1 or width < 1 or height % self.stride or width % self.stride:
            advice = f"a token covers {self.stride} x {self.stride} pixels; choose multiples of {self.stride}"
            raise ValueError(f"height x width is {height} x {width}, but {advice}")
        return height // self.stride, width // self.stride


def _ids(name: str, ids: AnyArray, rank: int, count: int) -> Int32[Array, "..."]:
    """Return ids as int32 after a check: an id out of range would silently be read as another."""
    array = np.asarray(ids)
    if array.ndim != rank or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; expected integers with {rank} axes")
    if array.size and (array.min() < 0 or array.max() >= count):
        raise ValueError(f"{name} holds {array.min()} to {array.max()}; expected 0 to {count - 1}")
    return jnp.asarray(array, jnp.int32)


def _to_uint8(pixels: Float[Array, "b hh ww 3"]) -> UInt8[np.ndarray, "b hh ww 3"]:
    return np.asarray(compiled.to_pixels(pixels))
