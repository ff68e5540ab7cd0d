r"""
Where four layers look, and how much they see
=============================================

Two distortions are the ends of a spectrum. This example looks at the whole of it: how sensitive four layers of ResNet18
are to every pixel of two photographs, how many directions each of them sees, and how its eigenvalues are spread; all
without the matrix, and with error bars.
"""  # noqa: D205, D400

import matplotlib.pyplot as plt

import fisherop as fo
from fisherop import models

# %%
# Layers and photographs
# ----------------------
#
# The stem of the network, and the ends of three of its stages. The network is the trained one where its weights are on
# disk or can be fetched; with random weights the figures look different, and everything said here about the numbers
# holds.

network, note = models.load("resnet18")
print("random weights: the trained ones could not be had" if note else "trained weights")
LAYERS = {"stem": "maxpool", "stage 1": "layer1", "stage 2": "layer2", "stage 3": "layer3"}
photos = {name: fo.images.photograph(name, size=32) for name in ("astronaut", "coffee")}
operators = {
    (photo, name): fo.FisherOperator(fo.Layer(network, layer), photos[photo])
    for photo in photos
    for name, layer in LAYERS.items()
}

# %%
# Where they look
# ---------------
#
# The diagonal of the Fisher matrix says how well a change of each pixel alone is noticed: its root is the
# discriminability :math:`d'` of a change by 1. It is the variance of the gradient of a random sum of responses, so a
# mean of squared gradients estimates it, and is never negative. With 32 probes, of two gradients each, the standard
# error of :math:`F_{ii}` is :math:`\sqrt{2/64}`, 18 % of the value, and half of that for :math:`d'`.

maps = {key: fo.sensitivity_map(F, 32, rng=0) for key, F in operators.items()}
fig = fo.plot.sensitivity_map({name: maps["astronaut", name] for name in LAYERS})

# %%
# The photograph shows through. The grid is that of the network's strides: neighbouring pixels take part in different
# numbers of responses.

fig = fo.plot.sensitivity_map({name: maps["coffee", name] for name in LAYERS})

# %%
# How much they see
# -----------------
#
# The trace of F is the total sensitivity, the sum of the map. A Krylov space takes the largest eigenvalues out, so that
# random probes need to tell the rest only. The participation ratio
# :math:`(\operatorname{tr} F)^2 / \|F\|_F^2` is the number of directions that share it: an image has 3072.

totals = {key: fo.trace(F, 32, rng=0) for key, F in operators.items()}
shares = {key: fo.effective_dimension(F, n_probes=24, rng=0) for key, F in operators.items()}
for key in operators:
    total, share = totals[key], shares[key]
    print(f"{key[0]:>9}, {key[1]}: trace {total.value:.4g} ± {total.standard_error:.2g}, ", end="")
    print(f"{share.value:.4g} ± {share.standard_error:.2g} directions")

# %%
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for offset, photo in ((-0.06, "astronaut"), (0.06, "coffee")):
    found = [shares[photo, name] for name in LAYERS]
    bars = [[e.value - e.low for e in found], [e.high - e.value for e in found]]
    place = [i + offset for i in range(len(LAYERS))]
    ax.errorbar(place, [e.value for e in found], bars, fmt="o", capsize=3, label=photo)
ax.set_xticks(range(len(LAYERS)), list(LAYERS))
ax.set(yscale="log", ylabel="directions seen, with 95 % intervals")
ax.legend(frameon=False)

# %%
# The whole spectrum
# ------------------
#
# Lanczos runs from a few random images tell how many eigenvalues lie where. The circles are the largest pairs,
# each with its own certificate; the shaded interval holds what so few steps cannot resolve. Far below the largest
# eigenvalue little is resolved, and the figure says so.

densities = {name: fo.spectral_density(operators["astronaut", name], 6, steps=40, rng=0) for name in LAYERS}
results = {name: fo.eigendistortions(operators["astronaut", name], k=3, which="LM", tol=1e-4, rng=0) for name in LAYERS}
fig = fo.plot.density(densities, results, decades=5)

# %%
# How many directions would be noticed at twice the size at which the first one is? Those whose eigenvalue is more than
# a quarter of the largest.

for name, one in densities.items():
    few = one.count(one.lambda_max / 4)
    print(f"{name}: {one.n - few.high:.0f} to {one.n - few.low:.0f} directions")
