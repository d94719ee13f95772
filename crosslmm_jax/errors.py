"""Errors that are the user's to mend: printed as one line, exit code 2, no traceback."""


class UserError(Exception):
    """A mistake in the user's input. The message names the file or field and the fix."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot work. The message names field, value and what would be right."""
