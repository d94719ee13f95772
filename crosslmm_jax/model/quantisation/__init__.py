"""Matrix products in 8 bits, for inference.

- `quantise`: quantised arrays and parameters, and products of them.
- `activation_bounds`: bounds of an encoder layer's activations, from its weights.
"""

from crosslmm_jax.model.quantisation.quantise import DTYPES, linear, operand, quantise, quantise_params

__all__ = ["DTYPES", "linear", "operand", "quantise", "quantise_params"]
