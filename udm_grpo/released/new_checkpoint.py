"""Build a released model that was not loaded from a folder, for `save_folder`; pre-training ends with it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxtyping import Array, Float

from udm_grpo.batches import Params
from udm_grpo.data.tokenizer import load_tokenizer, tokenizer_class
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.vq.config import GROUPS, VQConfig
from udm_grpo.released.contents import (
    CODEBOOK_NAME,
    SCHEDULER_FILE,
    PathLike,
    Problems,
    ReleasedModel,
    Scheduler,
    read_files,
    tokenizer_problems,
)
from udm_grpo.tensor_files.torch_files import Layout, read_json
from udm_grpo.tensor_files.weight_table import TRANSFORMER_TABLE, VQ_TABLE, Table, sources

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.35.1"
"""Version that the released folders name; programs that read them require one."""


def new_checkpoint(
    transformer_config: TransformerConfig,
    transformer: Params,
    vq_config: VQConfig,
    vq: Params,
    path_codebook: Float[Array, "v e"],
    scheduler: Scheduler,
    tokenizer_folder: PathLike,
    dtype: str = "float32",
) -> ReleasedModel:
    """Return a new released model, whose tensors will be saved in `dtype` (float32, bfloat16 or float16).

    tokenizer_folder: a Hugging Face tokenizer with its tokenizer_config.json; its model_max_length is L, at most 320.
    Raises WeightsError listing what does not fit together.
    """
    errors = Problems()
    tokenizer = errors.collect(lambda: load_tokenizer(Path(tokenizer_folder)))
    if tokenizer:
        errors.lines += tokenizer_problems(tokenizer, transformer_config)
    counts = vq_config.num_vq_embeddings, transformer_config.lm_head_size, path_codebook.shape[0]
    if len(set(counts)) > 1:
        errors.lines.append(f"num_vq_embeddings, lm_head_size and the rows of path_codebook differ: {counts}")
    errors.raise_any("the new model")
    assert tokenizer
    tokenizer_name = tokenizer_class(Path(tokenizer_folder))
    files = {f"tokenizer/{name}": content for name, content in read_files(Path(tokenizer_folder)).items()}
    configs = _configs(transformer_config, vq_config, scheduler, tokenizer_name)
    tokenizer_config = read_json(Path(tokenizer_folder) / "tokenizer_config.json")
    tokenizer_config.pop("backend", None)  # transformers 5 writes it
    configs["tokenizer/tokenizer_config.json"] = tokenizer_config | {"tokenizer_class": tokenizer_name}
    files |= {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in configs.items()}
    layouts = {
        "transformer": _layout(TRANSFORMER_TABLE, transformer, dtype),
        "vae": _layout(VQ_TABLE, vq, dtype),
        "scheduler": Layout({SCHEDULER_FILE: (CODEBOOK_NAME,)}, {CODEBOOK_NAME: "float32"}, {}),
    }
    return ReleasedModel(
        transformer_config, transformer, vq_config, vq, path_codebook, scheduler, tokenizer, files, layouts
    )


def _layout(table: Table, tree: Params, dtype: str) -> Layout:
    names = tuple(sorted(sources(table, tree)))
    return Layout({WEIGHTS_FILE: names}, dict.fromkeys(names, dtype), {WEIGHTS_FILE: {"format": "pt"}})


def _configs(
    transformer: TransformerConfig, vq: VQConfig, scheduler: Scheduler, tokenizer_name: str
) -> dict[str, dict[str, Any]]:
    """Return the configuration files as the release writes them, by relative path."""

    def named(class_name: str) -> dict[str, Any]:
        return {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION}

    vq_fields = dataclasses.asdict(vq)
    blocks = len(vq.block_out_channels)
    return {
        "model_index.json": named("URSAPipeline")
        | {
            "scheduler": ["diffnext.schedulers.scheduling_dfm", "KineticOptimalScheduler"],
            "tokenizer": ["transformers", tokenizer_name],
            "transformer": ["diffnext.models.transformers.transformer_ursa", "URSATransformer3DModel"],
            "vae": ["diffnext.models.autoencoders.autoencoder_vq", "AutoencoderVQ"],
        },
        "transformer/config.json": named("URSATransformer3DModel")
        | {"attn_implementation": None, "max_window_layers": transformer.num_hidden_layers}
        | dataclasses.asdict(transformer),
        "vae/config.json": named("AutoencoderVQ")
        | {"_quantizer_name": vq_fields.pop("quantizer_name"), "act_fn": "silu", "norm_num_groups": GROUPS}
        | {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
        | {"spatial_stride": vq.stride, "temporal_stride": 1, "sample_size": 1024}
        | {"decoder_dtype": None, "force_upcast": False}
        | vq_fields,
        "scheduler/scheduler_config.json": named("KineticOptimalScheduler") | dataclasses.asdict(scheduler),
    }
