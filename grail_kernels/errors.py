"""The root of the error family, shared by the kernels and the API above them."""


class GrailError(Exception):
    """An error that the caller can act on. Message: what came; what is allowed; what to do."""


class InputError(GrailError, ValueError):
    """An argument of the wrong kind, shape, dtype, device or range; nothing was changed."""


class BackendError(GrailError, RuntimeError):
    """A backend was asked for by name and cannot run here."""
