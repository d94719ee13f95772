"""Long videos: prefills over many frame counts, one line a V2V scope, up to what the device holds.

The decoder reads every compact token, so that its self-attention is quadratic in frames for any scope; so
is V2V over the whole video. All else is linear.
"""

from crosslmm_jax.profiling import prefill
from crosslmm_jax.profiling.record import Record


def run(record: Record) -> None:
    """Measures a prefill without a cache for each scope and frame count that the request names."""
    prefill.measure(record, forms=(False,))
