"""Loads the weights of a MODEL folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model_folder.contents import check_model_folder
from crosslmm_jax.model_folder.weights import DTypes, parameter_shapes, read_weights


def load_weights(
    folder: str | Path,
    config: ModelConfig,
    *,
    shardings: Mapping[str, Any] | None = None,
    dtype: DTypes = None,
) -> dict[str, Any]:
    """The parameters of a MODEL folder, each tensor read straight into its shards.

    Args:
      folder: a MODEL folder.
      config: says which parameters there must be, and their shapes.
      shardings: a tree like the parameters (`parallel.param_shardings`); None: the default device.
      dtype: of the result, e.g. "float32", or a tree like the parameters; None keeps that of the files.

    Raises:
      UserError: files are missing or damaged, or do not hold exactly the parameters of `config`.
    """
    check_model_folder(folder)
    return read_weights(Path(folder), parameter_shapes(config), shardings=shardings, dtype=dtype)
