"""The environment of a scorer process: an allow-list of our own variables.

A scorer runs the code of many packages, some of them written by users. Credentials for other services (WANDB_API_KEY,
cloud credentials) are not passed to it.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping

from rewards_bridge.options import resolve_environment
from rewards_bridge.redaction import is_secret

ALLOWED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM", "TMPDIR", "TMP", "TEMP"),
    *("PYTHON*", "VIRTUAL_ENV", "CONDA_*", "MAMBA_*", "XDG_*", "HOSTNAME", "COLUMNS", "LINES", "NO_COLOR"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_*", "GLIBC_TUNABLES", "MALLOC_*", "CC", "CXX", "LIBRARY_PATH", "CPATH"),
    *("CUDA_*", "CUDNN_*", "CUBLAS_*", "NVIDIA_*", "NCCL_*", "ROCM_*", "ROCR_*", "HIP_*", "HSA_*", "TPU_*"),
    *("OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "VECLIB_*", "NUMEXPR_*", "NUMBA_*"),
    *("TORCH_*", "PYTORCH_*", "TORCHINDUCTOR_*", "TRITON_*", "JAX_*", "XLA_*", "TF_*", "TOKENIZERS_*"),
    *("HF_*", "HUGGINGFACE_*", "TRANSFORMERS_*", "DIFFUSERS_*", "TIMM_*", "EASYOCR_*", "PADDLE*", "FLAGS_*"),
    *("MPLCONFIGDIR", "MPLBACKEND", "SKIMAGE_*", "SKLEARN_*", "SCIKIT_*", "OPENCV_*", "IMAGEREWARD_*", "CLIP_*"),
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GRPC_*"),
    *("SYSTEMROOT", "COVERAGE_*", "COV_CORE_*"),
)
"""Variables, with wildcards, that are passed to scorers, except those whose names mark a secret."""


def is_allowed(name: str) -> bool:
    """Return whether this variable is passed to scorers by default."""
    return not is_secret(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED)


def allowed_environment(extra: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """Return the part of our environment that is passed to a scorer, with the configured variables `extra`.

    It includes variables that an option *_env names. Raises UsageError as resolve_environment does.
    """
    named = {value for key, value in options.items() if key.endswith("_env")}
    ours = {name: value for name, value in os.environ.items() if is_allowed(name) or name in named}
    return {**ours, **resolve_environment(extra)}
