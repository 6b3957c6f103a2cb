"""The five-part restoration loss of the published recipe, each part made to work.

Weights: 0.25 defect + 0.30 (1 - SSIM) + 0.20 perceptual + 0.15 edge (Sobel) + 0.10 basic (L1 + MSE).
"""

from collections.abc import Callable

import torch.nn.functional as F
from kornia.filters import spatial_gradient
from kornia.metrics import ssim
from torch import Tensor, nn

from kintsugi.config import LossConfig

Distance = Callable[[Tensor, Tensor], Tensor]


class RestorationLoss(nn.Module):
    """Weighted sum of the five parts; a part with weight 0 is not computed.

    `perceptual` is a distance of two image batches; it is needed only where its weight is above 0.
    """

    def __init__(self, config: LossConfig, perceptual: Distance | None = None) -> None:
        super().__init__()
        self.weights: dict[str, float] = {k: v for k, v in config.weights.model_dump().items() if v > 0}
        assert perceptual is not None or "perceptual" not in self.weights
        self.perceptual = perceptual

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Every weighted part unweighted by its name, and their weighted sum as `total`.

        Args:
            output, target: (N, C, H, W), target in [0, 1].
            mask: (N, 1, H, W), 1 on defects. It weighs the defect part even where the model was not shown it.
        """
        parts: dict[str, Callable[[], Tensor]] = {
            "defect": lambda: defect_loss(output, target, mask),
            "ssim": lambda: ssim_loss(output, target),
            "perceptual": lambda: self.perceptual(output, target),  # type: ignore[misc]
            "edge": lambda: edge_loss(output, target),
            "basic": lambda: F.l1_loss(output, target) + F.mse_loss(output, target),
        }
        terms = {name: parts[name]() for name in self.weights}
        total = sum((weight * terms[name] for name, weight in self.weights.items()), start=output.new_zeros(()))
        return {**terms, "total": total}


def defect_loss(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over the mask's pixels alone; 0 for a batch without any."""
    weight = mask.expand_as(output)
    return ((output - target).abs() * weight).sum() / weight.sum().clamp_min(1)


def ssim_loss(output: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM with an 11 px window for images in [0, 1] (Wang et al., TIP 2004)."""
    return 1 - ssim(output, target, 11, max_val=1.0, padding="valid").mean()


def edge_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the Sobel derivatives in x and y."""
    return (spatial_gradient(output) - spatial_gradient(target)).abs().mean()


def build_loss(config: LossConfig, perceptual: Distance | None) -> RestorationLoss:
    return RestorationLoss(config, perceptual)
