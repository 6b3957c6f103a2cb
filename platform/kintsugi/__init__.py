"""Kintsugi: restoration of inspection images that keeps every defect visible."""

__version__ = "0.1.0"
