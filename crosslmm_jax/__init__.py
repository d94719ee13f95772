"""CrossLMM in JAX/Flax: video LMMs that read a few pooled tokens per frame and cross-attend to the others.

| file | holds |
|---|---|
| `config.py`, `presets.py` | checked settings, released sizes |
| `config_io.py` | configurations as JSON, config files, overrides of the command line |
| `batch.py` | the arrays of one batch |
| `errors.py` | mistakes of users, and rows or media that cannot be used |

`load` opens a MODEL folder. Each package says in its docstring what it holds.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crosslmm_jax.inference import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports `load` on first use, so that `import crosslmm_jax` does not start jax.

    From then on compiled programs are kept on disk, as `parallel.compilation_cache` says.
    """
    if name == "load":
        from crosslmm_jax.inference import load
        from crosslmm_jax.parallel import compilation_cache

        compilation_cache.use()
        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
