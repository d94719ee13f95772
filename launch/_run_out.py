"""Prints the run folder of a training command: launch/_run_out.py CONFIG.py [--field value ...]

Exit code 2, and one line on stderr, if the command is wrong: a launcher learns it before it starts anything.
"""

import sys

from crosslmm_jax.config_io import load_experiment
from crosslmm_jax.errors import UserError

try:
    print(load_experiment(sys.argv[1], sys.argv[2:]).run.out)
except UserError as error:
    sys.exit(print(f"crosslmm: error: {error}", file=sys.stderr) or 2)
