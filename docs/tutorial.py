"""
Eigendistortions, from a linear model to ResNet18
=================================================

Does a model see what we see? One way to ask is to look for the changes of an image that the model notices most and
least, and then to look at them ourselves. If the model sees as we do, we should find the first ones glaring and the
last ones hard to make out. Berardino, Laparra, Ballé and Simoncelli put the question in this form in 2017
(`Eigen-distortions of hierarchical representations <https://arxiv.org/abs/1710.02266>`_) and named such changes
*eigendistortions*.

The first example is a linear model small enough to be checked by hand. The second compares two layers of ResNet18 at
pictures. An appendix has the mathematics, and a table for those who come from plenoptic, whose tutorial asks the same
questions in the same order.
"""  # noqa: D205, D400

import warnings

import matplotlib.pyplot as plt
import torch
from torch import nn

import fisherop as fo
import fisherop.plenoptic as po
from fisherop import models

# %%
# Example 1: a linear model of a small signal
# -------------------------------------------
#
# 1.1 The model
# ~~~~~~~~~~~~~
#
# To us a model is any function :math:`f` that turns an input of :math:`n` numbers into a response of :math:`m`. What
# matters here is how the response moves when the input does, which is the Jacobian :math:`J = \partial f / \partial x`,
# :math:`m` rows by :math:`n` columns. Where :math:`f(x) = Mx`, the Jacobian is the matrix :math:`M`, whatever the
# input.
#
# A small step :math:`\epsilon` moves the response by :math:`J \epsilon`, whose squared length is
# :math:`\epsilon^T J^T J \epsilon`. The steps of unit length that make this largest and smallest are the first and the
# last eigenvector of :math:`F = J^T J`, the *Fisher information matrix* of the model when its responses are observed
# with white Gaussian noise.
#
# Our model has 25 inputs and 10 responses. The input may have any shape; as an image it would be
# ``(1, channels, height, width)``, and here it is one row of 25 pixels.

n, m = 25, 10
torch.manual_seed(0)
linear = nn.Linear(n, m, bias=False).eval()
x0 = torch.ones(1, 1, 1, n)

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.5), layout="constrained")
left.stem(x0.flatten().numpy())
left.set(title=f"input, {n} numbers", xlabel="entry")
right.stem(linear(x0).detach().flatten().numpy(), linefmt="C1", markerfmt="C1o")
right.set(title=f"response, {m} numbers", xlabel="entry")

# %%
# 1.2 Its eigendistortions
# ~~~~~~~~~~~~~~~~~~~~~~~~
#
# A :class:`~fisherop.FisherOperator` is the matrix :math:`F` of a model at an image. It is never written out: it only
# knows how to multiply a vector, by one pass forward and one backward through the model. As it is a SciPy
# ``LinearOperator``, other software can work with it as well.

F = fo.FisherOperator(linear, x0)
print(F)

# %%
# At this size all 25 eigenvectors can be had, by dense linear algebra. They come back in the shape of the input, the
# most noticed first, with their eigenvalues, and with a *residual* each: how far :math:`Fv` is from
# :math:`\lambda v`, measured anew when the solver is done.

exact = fo.eigendistortions(F, k=n, method="exact")
print(tuple(exact.eigendistortions.shape))
print(exact)

# %%
# 1.3 Is that right?
# ~~~~~~~~~~~~~~~~~~
#
# The Jacobian is an operator too. Multiplied by the identity it shows all its entries, and they should be the weights.

J = fo.JacobianOperator(linear, x0)
jacobian = J @ torch.eye(n)
weight = linear.weight.detach()
jacobian_is_weight = torch.allclose(jacobian, weight)
print("the Jacobian is the weight matrix:", jacobian_is_weight)

fig, panels = plt.subplots(2, 1, figsize=(6, 4.4), layout="constrained")
for ax, matrix, name in zip(panels, (jacobian, weight), ("Jacobian", "weights"), strict=True):
    drawn = ax.imshow(matrix.numpy(), vmin=weight.min().item(), vmax=weight.max().item(), cmap="coolwarm")
    ax.set(title=name, xlabel="input", ylabel="response")
fig.colorbar(drawn, ax=panels)

# %%
# Each eigendistortion is a signal of 25 entries. Beside each other, as the columns of one picture, and with their
# eigenvalues:

fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
drawn = ax.imshow(exact.eigendistortions.flatten(1).T.numpy(), vmin=-1, vmax=1, cmap="coolwarm")
ax.set(title="eigendistortions", xlabel="index in the spectrum", ylabel="entry")
fig.colorbar(drawn, ax=ax)

fig = fo.plot.spectrum(exact)

# %%
# 1.4 What they mean
# ~~~~~~~~~~~~~~~~~~
#
# A step along the first eigendistortion changes the response more than any other step of its length: nothing is more
# noticeable to this model. The change is :math:`\sqrt{\lambda}` times the step.
#
# The spectrum ends at index 9. Ten responses cannot report on twenty-five inputs, so fifteen dimensions of the input
# are lost: along them :math:`\lambda = 0`, and :math:`f(x + \epsilon) = f(x)` however large :math:`\epsilon` is. They
# are the *null space* of :math:`F`, and the result knows its dimension. In the figure these fifteen lie below the
# dotted line, where nothing can be told from zero in the precision that was used.

first, last = exact.eigendistortions[0], exact.eigendistortions[-1]
with torch.no_grad():
    change_first = (linear(x0 + first) - linear(x0)).norm().item()
    change_last = (linear(x0 + 100 * last) - linear(x0)).norm().item()
print(f"one step along the first: {change_first:.4f}; the root of its eigenvalue: {exact.eigenvalues[0] ** 0.5:.4f}")
print(f"a hundred steps along the last: {change_last:.1e}")
print("dimensions of the null space:", exact.nullity)

# %%
# Images have thousands of pixels, and no :math:`F` of theirs fits into memory. What we can do is multiply by it, again
# and again: iterative methods find the ends of the spectrum from nothing but products. The oldest of them is power
# iteration, and the method by default, ``"auto"``, is a better one wherever that pays. Let power iteration find the
# first and the last pair, which are the two that :func:`fisherop.eigendistortions` looks for unless told otherwise.

power = fo.eigendistortions(F, k=2, method="power", rng=0)
print(power)

fig = fo.plot.spectrum({"exact": exact, "power iteration": power})

# %%
# How well do the vectors agree? The first is the same one. (A vector and its negative are the same distortion; here the
# entry of largest magnitude is always positive.) The last is not: no vector is *the* last where fifteen share the
# eigenvalue zero, and which one is found depends on where the search began. Projected on all exact eigendistortions, it
# has no part in the ten that the model notices, and so it is a mixture of the fifteen others, and as good as any.

found = power.eigendistortions.flatten(1)
basis = exact.eigendistortions.flatten(1)
projection = basis @ found[1]

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.stem((found[0] - basis[0]).numpy())
left.set(title="first, power iteration less exact", xlabel="entry", ylim=(-1, 1))
right.axvspan(m - 0.5, n - 0.5, color="0.93", label="null space")
right.stem(projection.numpy())
right.set(title="last of power iteration, projected", xlabel="exact eigendistortion", ylim=(-1, 1))
right.legend()

print("the first ones agree:", torch.allclose(found[0], basis[0], atol=1e-3))
print("the last ones agree:", torch.allclose(found[1], basis[-1], atol=1e-3))
print(f"the part of the last that lies in the null space: {projection[m:].norm():.6f}")

# %%
# That is more than a matter of taste: results are told apart from accidents in ``clusters``, which has the dimension of
# the subspace that is determined. It is 1 for a vector that is unique, and at least 15 for the last.

print(exact.clusters)
print(power.message)

# %%
# 1.5 Every image has its own
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~
#
# The Fisher matrix belongs to a model *at an image*: what stands out on a clear sky may drown in foliage. A linear
# model is the exception. Its Jacobian is the same everywhere, and so are its eigendistortions.

x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
same_elsewhere = torch.allclose(fo.JacobianOperator(linear, x1) @ torch.eye(n), weight)
print("the Jacobian at another input is still the weight matrix:", same_elsewhere)

# %%
# One nonlinearity is enough to end that. Followed by a softplus, the same weights yield another first eigendistortion
# at each of the two inputs:

curved = nn.Sequential(linear, nn.Softplus())
firsts = [fo.eigendistortions(fo.FisherOperator(curved, x), k=1).eigendistortions.flatten() for x in (x0, x1)]
cosine = abs(firsts[0] @ firsts[1]).item()
print(f"cosine of the angle between the two: {cosine:.3f}")

# %%
# Example 2: which layer of ResNet18 sees more like us?
# -----------------------------------------------------
#
# Any part of a network is a model of vision, with the response of a layer for :math:`f(x)`. Do early layers or later
# ones agree better with what people notice?
#
# 2.1 An image
# ~~~~~~~~~~~~
#
# A colour wheel, drawn at the size that is asked for. Make it larger if your machine can bear it: 128 is still a matter
# of seconds. Pixel values lie between 0 and 1.

size = 64
wheel = fo.images.color_wheel(size)
print(tuple(wheel.shape))

# %%
# 2.2 Two models
# ~~~~~~~~~~~~~~
#
# :class:`~fisherop.Layer` ends a network at one of its layers, named as in ``named_modules()`` or, in a ResNet,
# numbered: 3 is the pooling that ends the stem, 6 the first block of the second stage. The network is the trained one,
# ``torchvision.models.resnet18(weights=ResNet18_Weights.DEFAULT)``, where its weights are on disk or can be fetched. If
# they cannot, the weights are random. All of what follows holds for these as well, but for what a trained eye would
# say. The network must be in evaluation mode, where it answers the same question twice in the same way; ``load`` sees
# to it. Pixels go in as they are, between 0 and 1, as in plenoptic's tutorial; trained weights expect normalized ones,
# and a study puts the normalization in front of the network, as "Use your own model" shows.

network, note = models.load("resnet18")
print("random weights: the trained ones could not be had" if note else "trained weights")
layers = {"layer 3": fo.Layer(network, 3), "layer 6": fo.Layer(network, 6)}
operators = {name: fo.FisherOperator(layer, wheel) for name, layer in layers.items()}
for name, operator in operators.items():
    print(f"{name}, {layers[name].layer}: {operator.shape[0]} pixel values, {operator.response.numel()} responses")

# %%
# 2.3 Their eigendistortions
# ~~~~~~~~~~~~~~~~~~~~~~~~~~
#
# Written out, each of these matrices would have 12288 × 12288 entries, 600 megabytes, and at 128 × 128 pixels sixteen
# times that. Products alone will do. ``tol`` bounds the residual relative to the largest eigenvalue, and the call does
# not keep silent if a pair fails to reach it: there is a warning, and ``converged`` says which.

results = {name: fo.eigendistortions(operator, k=2, rng=0) for name, operator in operators.items()}
for name, result in results.items():
    print(f"{name}\n{result}\n{result.message}\n")

# %%
# Layer 6 has fewer responses than the image has numbers, so a third of all directions at least must escape it; its last
# eigenvalue is zero, to rounding. The picture of both spectra shows the ends that were computed, and leaves out the
# thousands between.

fig = fo.plot.spectrum(results)

# %%
# 2.4 A look at them
# ~~~~~~~~~~~~~~~~~~
#
# Each distortion is added to the image at the same norm, so that it is fair to compare them, and is drawn alone below.
# One pixel of the image is one square of the figure. What would be brighter than white or darker than black is cut off,
# and the caption tells how much that was. A colour wheel on white paper has much of it, for it is at the edge of the
# range already.

fig = fo.plot.eigendistortions(results["layer 3"])

# %%

fig = fo.plot.eigendistortions(results["layer 6"])

# %%
# Equal norms ask "which do you notice more?". The other question is "how much of each can you just notice?": the model
# is predicted to tell :math:`x + \alpha v` from :math:`x` with discriminability :math:`d' = \alpha \sqrt\lambda`, so
# that its threshold :math:`d' = 1` lies at :math:`\alpha = 1 / \sqrt\lambda`. For the last distortion that is more than
# the range from black to white can hold, and the figure says at which :math:`d'` it had to stop.

fig = fo.plot.eigendistortions(results["layer 3"], alpha="threshold")

# %%
# To a model that is nearly linear, adding and subtracting a distortion are the same. To an observer they need not be:

fig = fo.plot.both_signs(results["layer 6"])

# %%
# How linear is it, then? Everything so far is about steps so small that the Jacobian tells their effect. Here the
# network answers to real ones. Where the ratio leaves 1, the prediction ends. The last distortion is the instructive
# one: its first-order effect is next to nothing, so what the network does notice of a large step comes from its bends
# alone.

fig = fo.plot.linearity(operators["layer 6"], results["layer 6"])

# %%
# On a screen the best display is one that flips between the two images, slowly.
# ``fo.plot.flip(results["layer 3"], "flip.gif", pair=-1)`` writes one.
#
# 2.5 Which layer is the better model?
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
#
# Within a layer, the ends look as they should: the first distortion is gathered in a small part of the picture, the
# last is fine noise spread over all of it. How does a layer like the other one's distortions? :math:`v^T F v` is what a
# layer notices of a :math:`v` of unit norm, whosever eigenvector that is.

noticed = {}
for observer, operator in operators.items():
    for origin, result in results.items():
        v = result.eigendistortions.flatten(1).T
        noticed[observer, origin] = (v * (operator @ v)).sum(0)
        most, least = noticed[observer, origin].tolist()
        print(f"{observer} notices of the distortions of {origin}: {most:.3g} of the first, {least:.3g} of the last")

# %%
# No layer notices anything more than its own first. But which of them sees as *we* do cannot be computed: people have
# to look. The better model is the one whose first distortion is easier for them to see than other models' first ones,
# and whose last is harder. In the experiments of Berardino and colleagues early layers of VGG16 did better than late
# ones, and models built after the first stages of human vision did better than either; four of these are here as
# :class:`~fisherop.LN`, :class:`~fisherop.LG`, :class:`~fisherop.LGG` and :class:`~fisherop.OnOff`.
#
# 2.6 Another image
# ~~~~~~~~~~~~~~~~~
#
# The Fisher matrix changes with the image, and so do its eigenvectors. A grey photograph becomes an input of the
# network by repeating its one channel.

photo = fo.images.photograph("camera", size=size, grey=True).expand(-1, 3, -1, -1)
elsewhere = {name: fo.eigendistortions(fo.FisherOperator(layer, photo), k=2, rng=0) for name, layer in layers.items()}

fig = fo.plot.eigendistortions(elsewhere["layer 3"])

# %%

fig = fo.plot.eigendistortions(elsewhere["layer 6"])

# %%
overlaps = {}
for name in layers:
    one, other = (r[name].eigendistortions[0].flatten() for r in (results, elsewhere))
    overlaps[name] = abs(one @ other).item()
    print(f"{name}: cosine of the angle between the first distortions of the two images, {overlaps[name]:.3f}")

# %%
# Appendix: the mathematics
# -------------------------
#
# **Why** :math:`F = J^T J`. Suppose that an observer sees the response of the model through noise: :math:`y = f(x) + z`
# with :math:`z` normal, of mean zero and covariance :math:`C`. Then
#
# .. math:: \log p(y \mid x) = -\tfrac12 (y - f(x))^T C^{-1} (y - f(x)) + \text{const},
#
# and its gradient in :math:`x`, the score, is :math:`s = J^T C^{-1} (y - f(x))`. Fisher information is the covariance
# of the score,
#
# .. math:: F = \mathrm{E}\, s s^T = J^T C^{-1}\, \mathrm{E}[z z^T]\, C^{-1} J = J^T C^{-1} J,
#
# and :math:`J^T J` where the noise is white and of unit variance. Pass ``noise=fo.noise.Gaussian(covariance)`` for
# another one. The eigenvectors of :math:`F` are the right singular vectors of :math:`C^{-1/2} J`, and its eigenvalues
# the squares of the singular values.
#
# **What it has to do with thresholds.** The responses to :math:`x` and :math:`x + \alpha v` are two clouds of equal
# shape. An ideal observer tells them apart by their distance in units of the noise,
#
# .. math:: d' = \| C^{-1/2} (f(x + \alpha v) - f(x)) \| \approx \alpha \sqrt{v^T F v},
#
# which for an eigenvector is :math:`\alpha \sqrt\lambda`. Setting :math:`d'` to a criterion gives the threshold
# :math:`\alpha = d' / \sqrt\lambda`; that no unbiased observer can do better is the Cramér-Rao bound (Seriès, Stocker
# and Simoncelli 2009 make it one on discrimination). Fechner measured distance in sensation by counting just noticeable
# differences along the way. :math:`F` is that ruler at every point of image space: along any path, :math:`\int
# \sqrt{\dot x^T F \dot x}\, dt` counts the steps of :math:`d' = 1`.
#
# **How the ends are found.** Power iteration multiplies a vector by :math:`F` until it stops turning; each product
# shrinks what does not belong to the first eigenvector by :math:`\lambda_2 / \lambda_1` at least. For the other end one
# iterates with :math:`F - \lambda_1 I`, where the ratio is :math:`(\lambda_1 - \lambda_{n-1}) / (\lambda_1 -
# \lambda_n)`: so near to 1, where small eigenvalues crowd, that thousands of products change nothing that can be seen.
# To stop when the eigenvalue stands still is then to stop by chance. A randomized SVD multiplies a random block of
# vectors a few times, and finds large eigenvalues only. Lanczos' method keeps all the products that it has made, and
# takes from their span the best vectors for both ends at once.
#
# Whatever the method, a result is accepted here by its residual alone. If :math:`\| Fv - \mu v \| = r` for a unit
# vector :math:`v`, then :math:`F` has an eigenvalue within :math:`r` of :math:`\mu`; those are the bounds in
# ``eigenvalue_bounds``. Here are Lanczos' method and power iteration at a model of early vision and a photograph of 32
# pixels a side. Power iteration is given more products, and still has to be stopped: a warning says so, and its last
# eigenvalue is still far above the true one.

grey = fo.images.photograph("camera", size=32, grey=True)
vision = fo.FisherOperator(fo.LGG(), grey)
lanczos = fo.eigendistortions(vision, k=2, method="lanczos", rng=0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", fo.ConvergenceWarning)
    stopped = fo.eigendistortions(vision, k=2, method="power", maxiter=500, rng=0)
for result in (lanczos, stopped):
    print(f"{result.method}: {result.n_matvec} products\n{result}\n")
print("the warning:", caught[0].message)

# %%
# What a residual cannot prove is that nothing smaller has been missed. ``certify="probe"`` adds a search of what is
# left, and says so with a probability.

probed = fo.eigendistortions(operators["layer 3"], k=2, rng=0, certify="probe")
print(probed.message)

# %%
# What changed from plenoptic
# ---------------------------
#
# .. list-table::
#    :header-rows: 1
#    :widths: 50 50
#
#    * - plenoptic
#      - fisherop
#    * - ``ed = Eigendistortion(image, model)``
#      - ``F = fo.FisherOperator(model, image)``
#    * - ``ed.synthesize(method="exact")``
#      - ``r = fo.eigendistortions(F, k=n, method="exact")``
#    * - ``ed.synthesize(method="power", k=1, max_iter=1000)``: one from either end
#      - ``r = fo.eigendistortions(F, k=2)``, and ``method="power"`` if it must be; k counts both ends
#    * - ``ed.synthesize(method="randomized_svd", k=5)``
#      - ``fo.eigendistortions(F, k=5, which="LM")``; ``method="randomized_svd"`` is there too
#    * - ``stop_criterion=1e-7``: the eigenvalue moves less than that
#      - ``tol=1e-6``: the residual, relative to the largest eigenvalue, is less than that
#    * - at ``max_iter`` the last iterate is returned without a word
#      - a ``ConvergenceWarning``, and ``r.converged``
#    * - ``ed.eigendistortions``, ``ed.eigenvalues``, ``ed.eigenindex``
#      - ``r.eigendistortions``, ``r.eigenvalues``, ``r.index``
#    * - with ``k > 1`` the smallest come in the reverse of the order that their index says
#      - always from the largest to the smallest
#    * - ``ed.jacobian``, after ``"exact"``
#      - ``fo.JacobianOperator(model, image)``, at any size
#    * - the global random state
#      - ``rng=0``
#    * - the tutorial's ``NthLayer(model, 3)``
#      - ``fo.Layer(model, 3)`` or ``fo.Layer(model, "maxpool")``
#    * - ``po.data.color_wheel()``, ``po.tools.center_crop``
#      - ``fo.images.color_wheel(size)``, ``fo.images.photograph(name, size)``, ``fo.images.center_crop``
#    * - ``display_eigendistortion(ed, 0)``, ``display_eigendistortion(ed, -1)``
#      - ``fo.plot.eigendistortions(r)``
#
# The class itself is here as well, with its arguments and attributes, on the solvers of this package. In a script that
# is at work already, one name changes: ``import fisherop.plenoptic as po``.

eig = po.Eigendistortion(x0, linear)
eig.synthesize(method="exact")
print(tuple(eig.eigendistortions.shape), torch.allclose(eig.jacobian, weight))
