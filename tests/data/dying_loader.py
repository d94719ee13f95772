"""A loader that kills its worker process. Worker processes import this module by name."""

import os
from typing import NoReturn

from crosslmm_jax.data.loading.example import ExampleLoader


class DyingLoader(ExampleLoader):
    """Kills the process that loads a row."""

    def load_or_replace(self, *args: object) -> NoReturn:
        """Never returns."""
        os._exit(1)
