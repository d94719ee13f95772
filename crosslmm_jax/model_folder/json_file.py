"""JSON files that people read too, as this project and Hugging Face write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosslmm_jax.errors import UserError
from crosslmm_jax.utils import cannot_read


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises a `UserError` when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; give the whole folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise cannot_read(path, f"is no readable JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; copy or download it again")
    return value


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Writes `value` as JSON for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
