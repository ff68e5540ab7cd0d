"""
Noise that is not white
=======================

What a model notices depends on how its responses are observed. With white Gaussian noise, the default, every response
is as reliable as every other. Neurons are not like that: the more they fire the more they vary, and neighbours vary
together. Here one model is looked at through three kinds of noise, and then a classifier, whose response is a choice.
"""  # noqa: D205, D400

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fisherop as fo

# %%
# One model, three kinds of noise
# -------------------------------
#
# The model has one cell for each pixel: a filter with a centre and a surround, and a softplus. Its scale is such that
# responses may pass for the number of spikes that a cell is expected to fire.


def gaussian(std):
    """Return a kernel of 15 by 15 pixels and of sum 1."""
    profile = torch.exp(-(torch.arange(-7.0, 8.0, dtype=torch.float64) ** 2) / (2 * std**2))
    return torch.outer(profile, profile) / profile.sum() ** 2


conv = nn.Conv2d(1, 1, 15, padding=7, padding_mode="reflect", dtype=torch.float64)
with torch.no_grad():
    conv.weight[0, 0] = 20 * gaussian(0.7) - 16 * gaussian(3.0)
    conv.bias.fill_(-3)
model = nn.Sequential(conv, nn.Softplus())

photo = fo.images.photograph("camera", size=32, grey=True, dtype=torch.float64)
rates = model(photo).detach()
print(
    f"{rates.numel()} responses, from {rates.min():.2g} to {rates.max():.2g}, half of them below {rates.median():.2g}"
)

# %%
# *Poisson* noise has the variance of its mean. *Shared* noise is white noise, and on top of it 64 sources, each of
# which moves all responses of its neighbourhood together: a covariance :math:`C = I + U U^T`, where the matrix
# :math:`U` has a column for each source. It is passed as the pair ``(U, 1.0)`` and never multiplied out.

distance = torch.arange(32.0, dtype=torch.float64)[:, None] - torch.arange(2, 32, 4)
bumps = torch.exp(-(distance**2) / (2 * 2.0**2))
U = 3 * torch.einsum("yi,xj->yxij", bumps, bumps).reshape(32 * 32, 64)
noises = {
    "white": fo.noise.Gaussian(),
    "Poisson": fo.noise.Poisson(),
    "shared": fo.noise.Gaussian(covariance=(U, 1.0)),
}
operators = {name: fo.FisherOperator(model, photo, noise=noise) for name, noise in noises.items()}
results = {name: fo.eigendistortions(F, k=2, method="exact") for name, F in operators.items()}

# %%
# With white noise the most noticeable distortion lies where the softplus is steepest, which is where responses are
# high. The least noticeable one is a pattern too fine for the filter, and lies where the picture is dark: responses are
# next to nothing there, and the softplus is flat.

fig = fo.plot.eigendistortions(results["white"])

# %%
# With Poisson noise high responses are no longer the best to report a change, for they are noisy. At slope
# :math:`\varphi'` and mean :math:`\varphi` the information is :math:`\varphi'^2 / \varphi`, which for a softplus is
# largest where the response is a little above 1, and falls on either side.

fig = fo.plot.eigendistortions(results["Poisson"])

# %%
# Shared noise looks like a change in a whole neighbourhood, and hides such changes. What is left to be noticed best
# alternates in sign within a neighbourhood.

fig = fo.plot.eigendistortions(results["shared"])

# %%
# The mean response where a distortion lies, each pixel weighted with its share of the squared distortion, says the same
# in a number. And every first distortion is the first for its own noise alone:

where = {}
for name, result in results.items():
    where[name] = [(v**2 * rates[0]).sum().item() for v in result.eigendistortions]
    print(f"{name}: mean response {where[name][0]:.2g} at the first distortion, {where[name][1]:.2g} at the last")

noticed = {}
for observer, F in operators.items():
    for origin, result in results.items():
        noticed[observer, origin] = fo.discriminability(F, result.eigendistortions[0])
    row = ", ".join(f"{noticed[observer, origin]:.3g} ({origin})" for origin in results)
    print(f"through {observer} noise, d' of a unit of each first distortion: {row}")

# %%
# Noise on top of noise can only take information away: :math:`(I + U U^T)^{-1}` is at most the identity, so with shared
# noise every eigenvalue, index by index, is at most what it is with white noise alone. Poisson noise has no such order
# with them, for it is smaller than white noise where responses are below 1.
#
# A choice instead of a response
# ------------------------------
#
# Which photograph is this patch of 16 pixels from? A small classifier is trained to tell, for so short a time that it
# is far from sure.

names = ["brick", "camera", "coins", "grass", "gravel", "moon"]
photos = torch.cat([fo.images.photograph(name, size=96, grey=True) for name in names])
torch.manual_seed(0)
classifier = nn.Sequential(nn.Conv2d(1, 16, 5), nn.Softplus(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(144, 6))
optimizer = torch.optim.Adam(classifier.parameters(), lr=0.02)
for _ in range(200):
    which = torch.randint(6, (64,))
    corners = torch.randint(80, (64, 2)).tolist()
    patches = torch.stack([photos[w, :, y : y + 16, x : x + 16] for w, (y, x) in zip(which, corners, strict=True)])
    optimizer.zero_grad()
    cross_entropy(classifier(patches), which).backward()
    optimizer.step()
classifier.double()

patch = fo.images.photograph("gravel", size=96, grey=True, dtype=torch.float64)[..., 40:56, 40:56]
p = classifier(patch).detach().softmax(1)
print(", ".join(f"{name} {q:.2f}" for name, q in zip(names, p[0].tolist(), strict=True)))

# %%
# The classifier answers with one of six names, drawn with these probabilities. That is
# :class:`fisherop.noise.Categorical`, and the model's output are its logits. To raise all six logits by the same amount
# changes no probability, so five directions of the response are left, and :math:`F` has rank 5.

F = fo.FisherOperator(classifier, patch, noise=fo.noise.Categorical())
choices = fo.eigendistortions(F, k=7, which="LM")
as_numbers = fo.eigendistortions(fo.FisherOperator(classifier, patch), k=7, which="LM")
fig = fo.plot.spectrum({"a choice of one of six": choices, "six numbers with white noise": as_numbers})

# %%
# The first distortion, at threshold, makes all of the patch brighter: so far the classifier goes by brightness
# more than by texture.

first = fo.eigendistortions(F, k=1)
fig = fo.plot.eigendistortions(first, alpha="threshold")

# %%
# An eigenvalue says here how fast the distribution changes. After a small step :math:`\alpha v` its Kullback-Leibler
# divergence from what it was is :math:`\alpha^2 \lambda / 2`, but for terms of third order.

alpha = 0.01
divergences = []
for v, value in zip(choices.eigendistortions[:5], choices.eigenvalues[:5], strict=True):
    q = classifier(patch + alpha * v).detach().softmax(1)
    divergences.append((p * (p / q).log()).sum().item())
    print(f"divergence {divergences[-1]:.3g}, predicted {alpha**2 * value / 2:.3g}")
