"""The root of the error family, shared by the kernels and the API above them."""


class GrailError(Exception):
    """An error that the caller can act on. Message: what came; what is allowed; what to do.

    Args:
        args: the message.
        page: the page that helps; default, that of the class.

    Attributes:
        page: the page of the documentation that helps, with its section, as a path in the
            repository: "docs/networks.md#where-sites-come-from".
    """

    page: str = "docs/reference/python.md#errors"

    def __init__(self, *args: object, page: str | None = None):
        super().__init__(*args)
        if page is not None:
            self.page = page


class InputError(GrailError, ValueError):
    """An argument of the wrong kind, shape, dtype, device or range; nothing was changed."""

    page = "docs/reference/recipe.md"


class BackendError(GrailError, RuntimeError):
    """A backend was asked for by name and cannot run here."""

    page = "docs/kernels.md"
