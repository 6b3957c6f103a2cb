"""The restoration network and the feature network of its perceptual loss."""

from kintsugi.models.perceptual import PerceptualDistance
from kintsugi.models.unet import Prediction, RestorationUNet, build_model

__all__ = ["PerceptualDistance", "Prediction", "RestorationUNet", "build_model"]
