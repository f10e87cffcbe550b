"""A library that an adapter attaches to: is it installed, tested, and as it was."""

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from grail.errors import AdapterError
from grail.version import __version__

_lock = threading.RLock()
_replaced: set[tuple[int, str]] = set()  # id of the owner, and name, of what is replaced now


@contextmanager
def attached(install: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """Attaches by `install` inside of a `with` block, and detaches by what it returns."""
    detach = install()
    try:
        yield
    finally:
        detach()


class Library:
    """A library that an adapter attaches to.

    Args:
        package: its name in a package index.
        tested: the versions that the adapter's tests ran with, oldest first.
    """

    def __init__(self, package: str, tested: tuple[str, ...]):
        self.package, self.tested = package, tested
        try:
            self.version = version(package)
        except PackageNotFoundError as error:
            raise AdapterError(
                f"{package} is not installed; install it with pip install {package}=={tested[-1]}"
            ) from error
        if self.version not in tested:
            warnings.warn(
                f"grail {__version__} was tested with {package} {', '.join(tested)}, and "
                f"{self.version} is installed",
                stacklevel=3,
            )

    def module(self, name: str) -> ModuleType:
        """Imports a module of the library.

        Raises:
            AdapterError: it is not there in this version, or imports one that is not installed.
        """
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or name):
                raise AdapterError(
                    f"{self.package} {self.version} imports {error.name}, which is not installed"
                ) from error
            raise AdapterError(self._lacks(f"module {error.name}")) from error

    def attribute(self, owner: Any, name: str) -> Any:
        """Returns what the adapter attaches to.

        Raises:
            AdapterError: it is not there in this version.
        """
        if not hasattr(owner, name):
            raise AdapterError(self._lacks(f"{getattr(owner, '__name__', owner)}.{name}"))
        return getattr(owner, name)

    def _lacks(self, what: str) -> str:
        return (
            f"{self.package} {self.version} has no {what}, which grail {__version__} attaches to; "
            f"tested versions of {self.package} are {', '.join(self.tested)}"
        )

    def replace(self, owner: Any, name: str, value: Any) -> Callable[[], None]:
        """Replaces an attribute of the library; returns a function that brings the old one back.

        Raises:
            AdapterError: it is not there in this version, or an adapter has replaced it already.
        """
        old, key = self.attribute(owner, name), (id(owner), name)
        with _lock:
            if key in _replaced:
                raise AdapterError(
                    f"{name} of {self.package} is replaced by an adapter already; end that one "
                    "before another is installed"
                )
            _replaced.add(key)
            setattr(owner, name, value)

        def restore() -> None:
            with _lock:
                if key in _replaced:
                    _replaced.remove(key)
                    setattr(owner, name, old)

        return restore

    @contextmanager
    def replacing(self, *replacements: tuple[Any, str, Any]) -> Iterator[None]:
        """Replaces attributes, given as (owner, name, value), inside of a `with` block."""
        done: list[Callable[[], None]] = []
        try:
            for owner, name, value in replacements:
                done.append(self.replace(owner, name, value))
            yield
        finally:
            for restore in reversed(done):
                restore()
