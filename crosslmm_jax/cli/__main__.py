"""`python -m crosslmm_jax.cli` is the same as `crosslmm`."""

import sys

from crosslmm_jax.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
