"""Names that a package offers without importing the modules that define them before they are used."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_attributes(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package (PEP 562).

    Inference needs neither `datasets` nor the Trainer: they are 100 MB of memory and seconds of start.

    Args:
        package: the package's `__name__`.
        modules: for each name, the module of the package that has it.
    """

    def get_attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return get_attribute
