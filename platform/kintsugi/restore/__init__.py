"""How a model meets an image: any size and depth, one answer however it was cut."""

from kintsugi.restore.restorer import Restoration, Restorer, RestoreSettings, shipped_weights

__all__ = ["Restoration", "RestoreSettings", "Restorer", "shipped_weights"]
