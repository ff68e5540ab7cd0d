r"""
Distortions measured otherwise than pixel by pixel
==================================================

An eigendistortion is the change that a model notices most, or least, *for its size*. Its size is by default the
Euclidean norm, in which every pixel counts as much as every other. With ``M=`` it is
:math:`\sqrt{v^T M v}` for a symmetric positive definite :math:`M` of one's choice, and the problem becomes
:math:`F v = \lambda M v`. Here :math:`M` is a weight for each pixel, and then another model.
"""  # noqa: D205, D400

import torch
from torch import nn

import fisherop as fo

# %%
# Pixel by pixel
# --------------
#
# The model is a filter with a centre and a weaker surround, and a softplus. It knows nothing of adaptation to light.


def gaussian(std):
    """Return a kernel of 15 by 15 pixels and of sum 1."""
    profile = torch.exp(-(torch.arange(-7.0, 8.0, dtype=torch.float64) ** 2) / (2 * std**2))
    return torch.outer(profile, profile) / profile.sum() ** 2


conv = nn.Conv2d(1, 1, 15, padding=7, padding_mode="reflect", bias=False, dtype=torch.float64)
with torch.no_grad():
    conv.weight[0, 0] = gaussian(0.5) - 0.7 * gaussian(3.0)
model = nn.Sequential(conv, nn.Softplus())

photo = fo.images.photograph("camera", size=32, grey=True, dtype=torch.float64)
F = fo.FisherOperator(model, photo)
plain = fo.eigendistortions(F, k=2, method="exact")
fig = fo.plot.eigendistortions(plain)

# %%
# A weight for each pixel
# -----------------------
#
# The same amount of light is a large change in the shade and a small one in the sun. Weber's law has it that what
# counts is the amount relative to the light that is there already, :math:`\Delta L / (L + L_0)`. As a measure of size
# this is a diagonal :math:`M` with the entries :math:`1 / (L + L_0)^2`, passed as an image of weights. :math:`L` is the
# luminance round a pixel, and :math:`L_0` keeps black from counting without bounds.

luminance = nn.functional.avg_pool2d(photo, 5, stride=1, padding=2, count_include_pad=False)
weights = 1 / (luminance + 0.1) ** 2
weber = fo.eigendistortions(F, k=2, M=weights, method="exact")
fig = fo.plot.eigendistortions(weber)

# %%
# A change in the shade is now expensive, so that what is noticed most for its size has moved into the light, and what
# is noticed least into the dark. The vectors come with unit Euclidean norm all the same. They are orthogonal in the
# sense of :math:`M`, and the eigenvalue is the ratio of what the model notices to the size by the new measure.

shade = {}
for name, result in {"plain": plain, "weber": weber}.items():
    shade[name] = [(v**2 * luminance[0]).sum().item() for v in result.eigendistortions]
    print(f"{name}: mean luminance {shade[name][0]:.2f} where the first lies, {shade[name][1]:.2f} where the last lies")

first, last = weber.eigendistortions.flatten(1)
product = (first * weights.flatten() * last).sum().item()
ratio = (fo.discriminability(F, first) ** 2) / (first * weights.flatten() * first).sum().item()
print(
    f"first'M last = {product:.1e}, first'F first / first'M first = {ratio:.6g}, eigenvalue {weber.eigenvalues[0]:.6g}"
)

# %%
# What amounts to the same
# ------------------------
#
# A diagonal :math:`M` is a change of variables. Let the model see :math:`s = x / (L + L_0)` and ask for its Euclidean
# eigendistortions in :math:`s`: the eigenvalues are these.

scale = luminance + 0.1
by_hand = fo.eigendistortions(fo.FisherOperator(lambda s: model(s * scale), photo / scale), k=2, method="exact")
print(by_hand.eigenvalues, weber.eigenvalues)

# %%
# The size of a distortion as another model has it
# ------------------------------------------------
#
# What does a model with luminance and contrast gain control notice, relative to the model without? Then :math:`M` is
# the Fisher matrix of the latter, plus :math:`\delta I`, for there are changes that it does not notice at all.
# Independent information adds, and an observer of the very pixels through noise of variance :math:`1 / \delta` has
# :math:`\delta I`. So :math:`M` is a sum of two Fisher matrices, and no entry of it need be computed: an :math:`M`
# that is known by its products has a method of its own, Davidson's.

delta = 1e-2 * plain.lambda_max
pixels = fo.FisherOperator(nn.Identity(), photo, noise=fo.noise.Gaussian(covariance=1 / delta))
M = fo.sum_fisher([F, pixels])
gain_control = fo.FisherOperator(fo.LGG().double(), photo)
alone = fo.eigendistortions(gain_control, k=2, method="exact")
relative = fo.eigendistortions(gain_control, k=2, M=M, rng=0)
print(relative)
print(relative.message)

# %%
# First what the model with gain control notices most and least, pixel by pixel, and then what it notices most and least
# relative to the other:

fig = fo.plot.eigendistortions(alone)

# %%
fig = fo.plot.eigendistortions(relative)

# %%
# The last one is the same in both, and it is the photograph itself, but for a constant: more contrast and more light
# together are what this gain control divides away. Where :math:`F v = 0`, no :math:`M` makes a difference. The first
# one is coarser relative to the other model, for that one notices fine changes as well, and coarse ones hardly.

itself = (photo + 1 / 2.94).flatten()  # LGG divides by 1 + 2.94 times the local luminance
cosines = [abs(r.eigendistortions[-1].flatten() @ itself / itself.norm()).item() for r in (alone, relative)]
roughness = [r.eigendistortions[0].diff(dim=-1).norm().item() for r in (alone, relative)]
print(f"cosine of the last with the photograph plus a constant: {cosines[0]:.6f} and {cosines[1]:.6f}")
print(f"norm of the differences between neighbours in the first: {roughness[0]:.2f} and {roughness[1]:.2f}")
