"""Losses as pure functions: images, adversarial, regularisers of a discriminator.

Legend: B batch. Logits of a discriminator are float [B, 1, h, w], one a patch; images float [B, 3, H, W] in [0, 1].
"""

from collections.abc import Callable

import torch
from torch import Tensor


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: logits above 1 for photographs, below -1 for reconstructions. Scalar."""
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """What the model minimises: minus the mean logit of its reconstructions. Scalar."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, layer: Tensor, average: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """How much to weigh ``adversarial`` so that its gradient at ``layer`` is as long as that of ``reconstruction``.

    Scalar in [0, 1e4] without gradient (VQGAN, arXiv 2012.09841, eq. 7). ``average`` sees each gradient first: under
    DDP a mean over the ranks makes the weight that of the whole batch.
    """
    (first,) = torch.autograd.grad(reconstruction, layer, retain_graph=True)
    (second,) = torch.autograd.grad(adversarial, layer, retain_graph=True)
    ratio = average(first).float().norm() / (average(second).float().norm() + 1e-4)
    return ratio.clamp(0.0, 1e4).detach()


def r1_penalty(real: Tensor, images: Tensor) -> Tensor:
    """Half the squared gradient, summed over pixels, of each photograph's mean logit; mean over the batch. Scalar.

    ``real``: logits of ``images``, which require gradients (arXiv 1801.04406).
    """
    (gradient,) = torch.autograd.grad(real.flatten(1).mean(1).sum(), images, create_graph=True)
    return 0.5 * gradient.flatten(1).square().sum(1).mean()


def lecam_penalty(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """Squared excess of each logit over the running mean of the other kind (LeCam GAN, arXiv 2104.03310). Scalar."""
    return (real - mean_fake).relu().square().mean() + (mean_real - fake).relu().square().mean()
