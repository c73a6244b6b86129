"""Every exception that fxcompress raises on purpose."""


class FxCompressError(Exception):
    """Base of all fxcompress errors: `except FxCompressError` catches each of them."""


class BudgetError(FxCompressError):
    """No plan fits the memory budget; the message names the smallest budget that would.

    smallest_mb: that budget, where it is known.
    """

    smallest_mb: float | None = None


class SettingsError(FxCompressError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class CodecError(FxCompressError, ValueError):
    """A codec spec cannot be read, or a codec was given a tensor or key that it cannot take."""
