"""Where forward and reverse mode contradict each other: which of them a difference quotient of the model confirms.

They do where a `torch.autograd.Function` has a wrong `jvp` or `backward`, or one that is no derivative on purpose,
where a hook changes a gradient, and in a few of torch's own functions: at duplicate places `max_unpool` is wrong in
reverse mode, and the product of `scatter_reduce` in forward mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherop.linearize.autodiff import Product

TOLD = 1e-3
"""Part of the derivative up to which a difference that no quotient explains is taken for rounding."""


@dataclass
class Verdict:
    """What a difference quotient says of two modes that contradict each other.

    Attributes
    ----------
    forward, reverse : bool
        Whether it confirms the one, or the other; neither at a kink, or where both are wrong.
    part : float
        By what part of the derivative they differ.
    """

    forward: bool
    reverse: bool
    part: float

    def words(self, served: str) -> str:
        """Say what was found, and which mode serves."""
        found = "forward mode" if self.forward else "reverse mode" if self.reverse else "neither"
        return (
            f"forward and reverse mode differ by {100 * self.part:.3g} %: check the jvp and backward of your Function, "
            f"and gradient hooks; a difference quotient confirms {found}, and {served} mode serves"
        )


def judged(
    respond: Product, image: Tensor, response: Tensor, v: Tensor, jv: Tensor, u: Tensor, jtu: Tensor
) -> Verdict | None:
    """Let a difference quotient along v decide between <Jv, u> and <v, J'u>; None where they may differ by rounding."""
    forward, reverse = _dot(jv, u), _dot(v, jtu)
    gap = abs(forward - reverse)
    size = float(image.norm()) or image.numel() ** 0.5
    along, across = float(v.norm()) / size, float(u.norm()) / u.numel() ** 0.5
    if gap <= 100 * torch.finfo(image.dtype).eps * float(response.norm()) * along * across:
        return None  # the derivative itself is rounding: that of a normalized number, say
    quotient = _quotient(respond, image, v.view_as(image) / along, u) * along
    verdict = Verdict(
        # Where rounding blurs the quotient, it is hardly ever near enough to either by chance.
        forward=abs(quotient - forward) < gap / 3,
        reverse=abs(quotient - reverse) < gap / 3,
        part=gap / abs(forward or reverse),
    )
    return verdict if verdict.forward or verdict.reverse or verdict.part > TOLD else None


def _quotient(respond: Product, image: Tensor, direction: Tensor, u: Tensor) -> float:
    """Return the central difference quotient of <response, u> along a direction as large as the image."""
    step = torch.finfo(image.dtype).eps ** (1 / 3)  # the errors of rounding and of curvature are about equal
    try:
        with torch.no_grad():
            ahead, behind = respond(image + step * direction), respond(image - step * direction)
            return _dot(ahead - behind, u) / (2 * step)
    except (ValueError, RuntimeError):  # the model ends here: the square root of a negative number, say
        return float("nan")


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double().flatten() @ b.double().flatten())
