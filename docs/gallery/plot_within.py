"""
Distortions that stay within bounds
===================================

Not every change of an image is of interest. One may want to distort a single patch, a single colour, or only what is
coarse; or nothing but what a picture-making network can produce. This example asks for the most and the least
noticeable distortion *within* such a set.
"""  # noqa: D205, D400

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import fisherop as fo

# %%
# A model that sees colour
# ------------------------
#
# Red, green and blue are turned into light against dark, red against green, and blue against yellow, and each of the
# three goes through a filter and a rectifier of its own. The image is small, so that the whole spectrum can be had.


class Opponent(nn.Module):
    """Three opponent channels, each with centre and surround; the two of colour are coarser."""

    def __init__(self):
        super().__init__()
        mix = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1 / 2, -1 / 2, 0], [-1 / 4, -1 / 4, 1 / 2]])
        self.register_buffer("mix", mix[..., None, None])
        settings = {"amplitude": 5.0, "kernel_size": 15}
        self.fine = fo.LN(**settings)
        self.coarse = fo.LN(center_std=1.0, **settings)

    def forward(self, image):
        """Return three channels of responses."""
        light, red_green, blue_yellow = nn.functional.conv2d(image, self.mix).split(1, dim=1)
        return torch.cat([self.fine(light), self.coarse(red_green), self.coarse(blue_yellow)], dim=1)


model = Opponent().double()
photo = fo.images.photograph("astronaut", dtype=torch.float64)[..., 16:208, 128:320]
photo = fo.images.resize(photo, 16)
n = photo.numel()

# %%
# A mask, a channel, a band
# -------------------------
#
# ``within=`` takes a mask of the pixels that may change; one colour channel; a band of spatial frequencies, in cycles
# per pixel; or any matrix, whose columns then span what is allowed. The restricted operator is :math:`B^T F B` with an
# orthonormal basis :math:`B` of it, and is smaller than :math:`F`. The distortions come back as images all the same.

patch = torch.zeros(16, 16, dtype=torch.bool)
patch[4:12, 4:12] = True
bounds = {
    "anywhere": None,
    "in the patch": patch,
    "in blue": fo.restrict.Channel(2),
    "coarse": fo.restrict.Band(0.0, 0.15),
}
operators = {name: fo.FisherOperator(model, photo, within=within) for name, within in bounds.items()}
spectra = {name: fo.eigendistortions(F, k=F.shape[0], method="exact") for name, F in operators.items()}
for name, result in spectra.items():
    values = result.eigenvalues
    print(f"{name:>12}: {len(values):>4} dimensions, eigenvalues from {values[0]:.3g} to {values[-1]:.3g}")

# %%
# The model cannot see any even change of colour, be it lighter, redder or bluer: its filters take the surround from the
# centre. So :math:`F` has a null space of three dimensions. In blue alone one of them is left, and within the patch
# there is none, for a change that ends at an edge is not even. (Which of the three comes last is an accident.)

ends = {name: fo.eigendistortions(F, k=2, method="exact") for name, F in operators.items()}
fig = fo.plot.eigendistortions(ends["anywhere"])

# %%
fig = fo.plot.eigendistortions(ends["in the patch"])

# %%
fig = fo.plot.eigendistortions(ends["in blue"])

# %%
fig = fo.plot.eigendistortions(ends["coarse"])

# %%
# What a bound does to the eigenvalues
# ------------------------------------
#
# Whoever may choose from less cannot find more: the first eigenvalue falls, or stays. Cauchy's theorem says it of all
# of them. If :math:`\lambda_0 \ge \dots \ge \lambda_{n-1}` are those of :math:`F` and :math:`\mu_0 \ge \dots \ge
# \mu_{r-1}` those of :math:`B^T F B`, then :math:`\lambda_{i+n-r} \le \mu_i \le \lambda_i`. They *interlace*.
# The zeros are below the axis of the figure.

whole = spectra["anywhere"].eigenvalues
rounding = 1e-12 * whole[0]
interlaced = {}
fig, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
for ax, name in zip(panels, list(bounds)[1:], strict=True):
    mu = spectra[name].eigenvalues
    upper, lower = whole[: len(mu)], whole[n - len(mu) :]
    interlaced[name] = bool((mu <= upper + rounding).all() and (mu >= lower - rounding).all())
    ax.fill_between(range(len(mu)), np.maximum(lower, 1e-9), upper, color="0.85", label="allowed by Cauchy")
    ax.plot(mu.clip(1e-9), color="C0", label="found")
    ax.set(title=name, xlabel="index", yscale="log", ylim=(1e-8, 10))
panels[0].set_ylabel("eigenvalue")
panels[0].legend(loc="lower left")
print(interlaced)

# %%
# What a decoder can draw
# -----------------------
#
# A decoder :math:`G` turns a few latent numbers into an image, and *model after decoder* is a model of these numbers.
# Nothing but plain composition is needed: the Fisher matrix of ``nn.Sequential(decoder, model)`` at a latent :math:`z`
# is :math:`G'^T F\, G'`, and its eigenvectors are the latent changes whose pictures the model notices most and least.
#
# Our decoder is a modest one: it draws from the colours of 8 by 8 points, smoothed and kept between black and
# white. The latent is chosen for its image to be near the photograph.

decoder = nn.Sequential(nn.Upsample(scale_factor=2, mode="bicubic"), nn.Sigmoid())
z = fo.images.resize(photo, 8).clamp(0.02, 0.98).logit()
drawn = decoder(z)
latent = fo.FisherOperator(nn.Sequential(decoder, model), z)
found = fo.eigendistortions(latent, k=2, method="exact")
print(found)

# %%
# Moved along each latent distortion by the same amount, the decoder draws the pictures below. An even change of the
# latents is no longer an even change of the picture, for the sigmoid bends it; so nothing escapes the model altogether,
# but what comes last is still a tint.

pictures = {"decoded": drawn}
for i, v in zip(found.index, found.eigendistortions, strict=True):
    pictures[f"latent distortion {i}"] = decoder(z + 4 * v)
fig, panels = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
for ax, (name, picture) in zip(panels, {"photograph": photo, **pictures}.items(), strict=True):
    fo.plot.show_image(ax, picture)
    ax.set_title(name)

# %%
# To check it, push the latent distortions through :math:`G'` and ask the model itself, at the decoded image:

G = fo.JacobianOperator(decoder, z)
pushed = (G @ found.eigendistortions.flatten(1).T).T.reshape(2, *photo.shape[1:])
noticed = fo.discriminability(fo.FisherOperator(model, drawn), pushed)
print(f"d' of the pictures: {noticed}, roots of the latent eigenvalues: {found.eigenvalues**0.5}")
