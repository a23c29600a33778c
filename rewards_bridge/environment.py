"""The environment of a scorer's process: what a scorer needs of ours, and nothing else.

A scorer loads the code of many packages, some of them a user's own. What logs in elsewhere (WANDB_API_KEY, cloud
credentials) is none of its business.
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
"""Names, with wildcards, of variables that scorers get; never those whose names are those of secrets."""


def is_allowed(name: str) -> bool:
    """Return whether scorers get this variable of ours without being asked to."""
    return not is_secret(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED)


def allowed_environment(extra: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """Return the part of our environment that a scorer gets, and `extra`, which the configuration gives it.

    Variables that an option *_env names are among it. Raises UsageError for what resolve_environment refuses.
    """
    named = {value for key, value in options.items() if key.endswith("_env")}
    ours = {name: value for name, value in os.environ.items() if is_allowed(name) or name in named}
    return {**ours, **resolve_environment(extra)}
