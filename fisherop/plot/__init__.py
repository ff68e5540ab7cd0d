"""Figures of results with matplotlib: distortions, spectra, and how far a model is linear; and images that flip.

>>> import torch, fisherop as fo, fisherop.plot
>>> F = fo.FisherOperator(torch.nn.AvgPool2d(2), torch.full((1, 1, 8, 8), 0.5))
>>> fig = fo.plot.eigendistortions(fo.eigendistortions(F, k=2))
>>> [ax.get_label() for ax in fig.axes]
['image', 'distorted 0', 'distortion 0', 'distorted 63', 'distortion 63']

Panels of images are exact: a pixel of the image is a square of ``zoom`` by ``zoom`` pixels of the figure, in the colour
that it has, so that nothing is seen which interpolation put there. That holds for `Figure.savefig` as it is; another
``dpi`` scales the panels.

What all figures say of a pair is its index in the spectrum (0 is what the model notices most), its eigenvalue λ, and
its residual. A distortion v has unit norm; αv is predicted to be told from nothing with discriminability d′ = α√λ.
"""

try:
    import matplotlib.axes  # noqa: F401
except ImportError as error:
    raise ImportError('figures are drawn with matplotlib: pip install "fisherop[plot]"') from error

from fisherop.plot.animation import flip
from fisherop.plot.curves import density, linearity, spectrum
from fisherop.plot.maps import sensitivity_map
from fisherop.plot.pairs import both_signs, eigendistortions
from fisherop.plot.panels import show_distorted, show_distortion, show_image

__all__ = [
    "both_signs",
    "density",
    "eigendistortions",
    "flip",
    "linearity",
    "sensitivity_map",
    "show_distorted",
    "show_distortion",
    "show_image",
    "spectrum",
]
