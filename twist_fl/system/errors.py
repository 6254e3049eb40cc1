"""What a user can mend, and what went wrong: the errors whose message alone is shown."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user's configuration cannot be run; the message names the value, the constraint and the fix."""


class LaunchError(RuntimeError):
    """Flower did not start, or the run did not finish; the message names the log to read."""


class DamagedError(ConfigError):
    """A file is not what was written; the message names it and what to do."""
