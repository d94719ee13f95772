"""Errors that are the user's to mend: printed as one line, exit code 2, no traceback."""


class UserError(Exception):
    """A mistake in the user's input. The message names the file or field and the fix."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot work. The message names field, value and what would be right."""


class MediaError(UserError):
    """A picture or video that cannot be used. `reason` is its class, short and fixed, to count by."""

    def __init__(self, message: str, reason: str = "other") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["MediaError"], tuple[str, str]]:
        """Keeps the reason on the way between processes."""
        return type(self), (str(self), self.reason)
