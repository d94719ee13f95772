"""Parameters: how modules declare them, how they and activations are sharded.

- `tables`: a module's parameters as a table of shapes, logical axes and initialisers; `separate_layers`.
- `partitioning`: logical axes of activations, and of the devices that share an attention.
- `low_rank`: LoRA: a matrix with an adapter in its place, and merged again.
- `initialise`: the parameters of a new model (imported by `crosslmm_jax.model`, since it needs the model).
"""

from crosslmm_jax.model.params.partitioning import AxisRules, constrain
from crosslmm_jax.model.params.tables import Params, Weight, WeightTable

__all__ = ["AxisRules", "Params", "Weight", "WeightTable", "constrain"]
