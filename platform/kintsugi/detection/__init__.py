"""What finds the defects in an image, and what it finds before and after a restoration."""

from kintsugi.detection.detector import Detector, defect_map, load_detector

__all__ = ["Detector", "defect_map", "load_detector"]
