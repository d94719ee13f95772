"""CrossLMM in JAX/Flax: video LMMs with a few pooled tokens a frame and dual cross-attention to the rest."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crosslmm_jax.inference import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports `load` when it is asked for, so that `import crosslmm_jax` does not start jax."""
    if name == "load":
        from crosslmm_jax.inference import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
