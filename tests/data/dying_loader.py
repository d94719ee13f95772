"""A loader that kills its worker; in a module of its own, since worker processes import it by name."""

import os
from typing import NoReturn

from crosslmm_jax.data.loading.example import ExampleLoader


class DyingLoader(ExampleLoader):
    """Takes its process with it."""

    def __call__(self, *args: object) -> NoReturn:
        """Never returns."""
        os._exit(1)
