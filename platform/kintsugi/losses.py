"""The five-part restoration loss of the published recipe, each part made to work, and what goes beyond it.

The recipe: 0.25 defect + 0.30 (1 - SSIM) + 0.20 perceptual + 0.15 edge (Sobel) + 0.10 basic (L1 + MSE).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d, spatial_gradient
from kornia.metrics import ssim
from torch import Tensor, nn

from kintsugi.models import Prediction
from kintsugi.sections import LossConfig

Distance = Callable[[Tensor, Tensor], Tensor]


class RestorationLoss(nn.Module):
    """Weighted sum of the parts; one with weight 0 is not computed.

    `perceptual` is a distance of two image batches; it is needed only where its weight is above 0.
    """

    def __init__(self, config: LossConfig, perceptual: Distance | None = None) -> None:
        super().__init__()
        more = {"mask": config.mask, "error": config.error, "invention": config.invention}
        self.weights: dict[str, float] = {k: v for k, v in {**config.weights.model_dump(), **more}.items() if v > 0}
        self.quantile = config.error_quantile
        assert perceptual is not None or "perceptual" not in self.weights
        self.perceptual = perceptual

    def forward(
        self,
        prediction: Prediction,
        target: Tensor,
        mask: Tensor,
        labelled: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every weighted part unweighted by its name, and their weighted sum as `total`.

        Args:
            target: (N, C, H, W) in [0, 1].
            mask: (N, 1, H, W), 1 on defects. It weighs the defect part even where the model was not shown it.
            labelled: (N,) of 0 and 1; where 0, nobody drew the mask and the defect map is not judged. Default 1.
            scale: (N,) by which prediction and target are multiplied first, so that a dark exposure counts as
                much as a bright one. Default 1.
        """
        factor = 1.0 if scale is None else scale.view(-1, 1, 1, 1)
        output, target = prediction.image * factor, target * factor
        parts: dict[str, Callable[[], Tensor]] = {
            "defect": lambda: defect_loss(output, target, mask),
            "ssim": lambda: ssim_loss(output, target),
            "perceptual": lambda: self.perceptual(output, target),  # type: ignore[misc]
            "edge": lambda: edge_loss(output, target),
            "basic": lambda: F.l1_loss(output, target) + F.mse_loss(output, target),
            "charbonnier": lambda: charbonnier_loss(output, target),
            "frequency": lambda: frequency_loss(output, target),
            "mask": lambda: mask_loss(prediction.defect, mask, labelled),
            "error": lambda: error_loss(prediction.error, output / factor, target / factor, self.quantile),
            "invention": lambda: invention_loss(output, target, mask),
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


def charbonnier_loss(output: Tensor, target: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Mean of sqrt(difference^2 + epsilon^2): L1 that is smooth at 0 (Lai et al., CVPR 2017)."""
    return torch.sqrt((output - target).square() + epsilon**2).mean()


def frequency_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the orthonormal Fourier transforms (Cho et al., "MIMO-UNet", ICCV 2021)."""
    return torch.view_as_real(torch.fft.rfft2((output - target).float(), norm="ortho")).abs().mean()


def mask_loss(logits: Tensor | None, mask: Tensor, labelled: Tensor | None = None) -> Tensor:
    """Binary cross-entropy plus soft Dice (Milletari et al., 3DV 2016) of the defect map; 0 if nothing is labelled."""
    assert logits is not None
    judged = torch.ones_like(mask) if labelled is None else labelled.view(-1, 1, 1, 1).expand_as(mask)
    count = judged.sum().clamp_min(1)
    entropy = (F.binary_cross_entropy_with_logits(logits, mask, reduction="none") * judged).sum() / count
    share = torch.sigmoid(logits) * judged
    overlap = (share * mask).sum()
    return entropy + 1 - (2 * overlap + 1) / (share.sum() + (mask * judged).sum() + 1)


def error_loss(bound: Tensor | None, output: Tensor, target: Tensor, quantile: float) -> Tensor:
    """Pinball loss: least where `bound` is the `quantile` of the absolute error (Koenker and Bassett, 1978)."""
    assert bound is not None
    over = (output - target).abs().mean(1, keepdim=True).detach() - bound
    return torch.maximum(quantile * over, (quantile - 1) * over).mean()


def invention_loss(output: Tensor, target: Tensor, mask: Tensor, margin: float = 4 / 255) -> Tensor:
    """How far defect-free pixels differ from the target by more than `margin` in a band of 2 to 12 px."""
    difference = output - target
    fine, coarse = (
        gaussian_blur2d(difference, (side, side), (sigma, sigma), "replicate")
        for side, sigma in ((13, 2.0), (49, 12.0))
    )
    excess = F.relu((fine - coarse).abs() - margin) * (1 - mask)
    return excess.mean()


def build_loss(config: LossConfig, perceptual: Distance | None = None) -> RestorationLoss:
    return RestorationLoss(config, perceptual)
