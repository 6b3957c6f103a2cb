"""A model as one ONNX graph that other runtimes read, checked against the Restorer's answers."""

from kintsugi.export.graph import OPSETS, ExportSettings, Side
from kintsugi.export.parity import TOLERANCE, check_parity
from kintsugi.export.writer import Exported, export_model, pools_over_input

__all__ = [
    "OPSETS",
    "TOLERANCE",
    "ExportSettings",
    "Exported",
    "Side",
    "check_parity",
    "export_model",
    "pools_over_input",
]
