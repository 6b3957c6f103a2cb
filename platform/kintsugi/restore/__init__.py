"""How a model meets an image: any size and depth, one answer however it was cut."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kintsugi.restore.restorer import Restoration, Restorer, RestoreSettings, shipped_weights

__all__ = ["Restoration", "RestoreSettings", "Restorer", "shipped_weights"]


def __getattr__(name: str) -> Any:
    """On first use: who only reads and writes strips, as a decoder's child does, needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("kintsugi.restore.restorer"), name)
