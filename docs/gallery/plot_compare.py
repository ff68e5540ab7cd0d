"""
Three models at one photograph
==============================

Where two models disagree about what can be seen, an experiment can tell which of them is right. This example compares
two layers of ResNet18 and a small model of early vision, and looks for the distortions on which they disagree most.
"""  # noqa: D205, D400

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import conv2d, pad, softplus

import fisherop as fo
from fisherop import models

# %%
# The models
# ----------
#
# Any module is a model. This one, after the first stages of vision, takes the surround of each pixel from its centre,
# divides the result by the luminance round about and then by its own contrast, and rectifies.


class GainControl(nn.Module):
    """Centre less surround, divided by local luminance and by local contrast; then softplus."""

    def __init__(self):
        super().__init__()
        for name, std in {"centre": 0.6, "surround": 2.5}.items():
            profile = torch.exp(-(torch.arange(-7.0, 8.0) ** 2) / (2 * std**2))
            self.register_buffer(name, torch.outer(profile, profile)[None, None] / profile.sum() ** 2)

    def blur(self, image, kernel):
        """Return local means, of an image that is reflected at its border."""
        return conv2d(pad(image, (7, 7, 7, 7), mode="reflect"), kernel)

    def forward(self, image):
        """Return one response for each pixel."""
        mean = self.blur(image, self.surround)
        contrast = (self.blur(image, self.centre) - 0.8 * mean) / (0.1 + mean)
        energy = self.blur(contrast**2, self.surround)
        return softplus(5 * contrast / (0.2 + (energy + 1e-6).sqrt()))


# %%
# The two layers are those of the tutorial: number 3 ends the stem of ResNet18, and number 6 is the first block of its
# second stage. The network is the trained one where its weights are on disk or can be fetched. If they cannot, the
# weights are random, and what follows holds all the same, but for what a trained eye would say.

network, note = models.load("resnet18")
print("random weights: the trained ones could not be had" if note else "trained weights")
layer3, layer6 = fo.Layer(network, 3), fo.Layer(network, 6)
observers = {
    "gain control": GainControl(),
    "layer 3": lambda grey: layer3(grey.expand(-1, 3, -1, -1)),
    "layer 6": lambda grey: layer6(grey.expand(-1, 3, -1, -1)),
}
photo = fo.images.photograph("camera", size=20, grey=True)
operators = {name: fo.FisherOperator(model, photo) for name, model in observers.items()}
for name, F in operators.items():
    print(f"{name}: {F.shape[0]} pixel values, {F.response.numel()} responses")

# %%
# Each by itself
# --------------

results = {name: fo.eigendistortions(F, k=2, method="exact") for name, F in operators.items()}
fig = fo.plot.eigendistortions(results["gain control"])

# %%
fig = fo.plot.eigendistortions(results["layer 3"])

# %%
fig = fo.plot.eigendistortions(results["layer 6"])

# %%
# The threshold of a distortion is the size at which it is predicted to be just noticed, :math:`1 / \sqrt\lambda`. It is
# infinite in a null space.

for name, result in results.items():
    print(f"{name}: thresholds {fo.thresholds(result)}")

# %%
# Each on the others' distortions
# -------------------------------
#
# Berardino and colleagues showed people the first and the last distortion of a model, and took the difference of the
# logarithms of their thresholds, :math:`D`, for a score of that model: it is large where the observer agrees with the
# model about what is conspicuous and what is not. The observer may be another model as well.

table = fo.threshold_table(operators, results)
print(table)

# %%
# Every observer agrees with itself most: none has a larger :math:`D` for another's distortions than for its own. A
# negative :math:`D` is plain disagreement, where the observer notices the last distortion more than
# the first.

fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
table.plot(ax)

# %%
# Two models
# ----------
#
# Which distortion does one model notice most, and which least, *relative to another*? The ratio of squared
# sensitivities :math:`v^T F_A v / v^T F_B v` is largest and smallest at the ends of a generalized eigenproblem. What
# model B notices less than a part ``delta`` of its greatest counts as that, or the ratio would have no bounds.

ratio = fo.generalized_eigendistortions(operators["gain control"], operators["layer 3"], delta=0.01, rng=0)
print(ratio)
fig = fo.plot.eigendistortions(ratio)

# %%
for name in ("gain control", "layer 3"):
    print(f"{name}: d' per unit of distortion {fo.discriminability(operators[name], ratio.eigendistortions)}")

# %%
# Three models
# ------------
#
# The *principal distortions* of several models are those that tell them apart best: the two for which the ratio of the
# sensitivities differs most from model to model, in the variance of its logarithm. A model's scale makes no difference.
# People who are shown both, at equal norms, take the side of one model or another by which of them they notice more.

principal = fo.principal_distortions(list(operators.values()), k=2, delta=0.01, restarts=0)
print(principal.message)

fig, panels = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
for i, (pair, v) in enumerate(zip(panels.reshape(2, 2), principal.distortions, strict=True)):
    fo.plot.show_distorted(pair[0], photo, v, 0.05 * photo.numel() ** 0.5)
    fo.plot.show_distortion(pair[1], v)
    pair[0].set_title(f"distorted {i}")
    pair[1].set_title(f"principal distortion {i}")
for name, (one, other) in zip(operators, principal.sensitivities, strict=True):
    print(f"{name}: d' per unit {one:.3g} and {other:.3g}, ratio {one / other:.3g}")

# %%
# All of them
# -----------
#
# Responses that are independent add their information: ``sum_fisher`` is the matrix of an observer who has all three
# models at once, and notices no change less than any one of them does. ``mean_fisher`` averages, also over images: its
# first eigenvector is what a model notices most in all of them, on the average.

all_three = fo.sum_fisher(operators.values())
together = fo.eigendistortions(all_three, k=2, method="exact")
print(f"together: most noticeable {together.eigenvalues[0]:.4g}, least {together.eigenvalues[-1]:.3g}")
for name, result in results.items():
    print(f"{name}: most noticeable {result.eigenvalues[0]:.4g}, least {result.eigenvalues[-1]:.3g}")

mirrored = fo.FisherOperator(observers["gain control"], photo.flip(3))
average = fo.eigendistortions(fo.mean_fisher([operators["gain control"], mirrored]), k=2, method="exact")
print(f"gain control, at the photograph and its mirror image on the average: {average.eigenvalues[0]:.4g}")
