"""The class `Eigendistortion` of plenoptic, with its names, shapes and warnings, on this package's solvers.

In a script written for plenoptic, one name changes: ``import fisherop.plenoptic as po``.

>>> import torch
>>> import fisherop.plenoptic as po
>>> model = torch.nn.Conv2d(1, 2, 3, bias=False).eval()
>>> eig = po.Eigendistortion(torch.rand(1, 1, 8, 8), model)
>>> eig.synthesize()
>>> eig.eigendistortions.shape, eig.eigenindex
(torch.Size([2, 1, 8, 8]), tensor([ 0, 63]))

The interface is that of releases 1.x and 2.x: https://docs.plenoptic.org. What differs, and why:

- ``"power"`` runs `fisherop.eigendistortions` with ``method="auto"``, which is exact for small problems and Lanczos for
  others. `stop_criterion` bounds residuals relative to the largest eigenvalue, not the change of an eigenvalue from one
  step to the next. Pairs that did not converge are told by a `fisherop.ConvergenceWarning`.
- ``"randomized_svd"`` is a block Krylov iteration that goes on until residuals are small. `p` and `q`, which set the
  accuracy there, are accepted and have no effect; no error estimate is given as a warning.
- All values descend, the k smallest too; `eigenvalues` is 1-D for every k; `k` has to fit the image.
- Vectors have a fixed sign, their entry of largest magnitude being positive, and no global random state is used.
- Models may have weights that require gradients, and may return a tuple, list or dict of tensors. Complex and half
  precision images are refused, and models that in training mode write their buffers. A Jacobian of zeros is allowed.
- The model is linearized when the object is made. Weights written later are noticed, and `synthesize` then raises
  RuntimeError; `Eigendistortion.to` linearizes again.
- `Eigendistortion.result` has residuals, bounds and what was done; nothing is printed.
- Files are this package's own: neither package reads the other's.
- In a figure all images share one grey scale, and distortions alone are scaled to be seen; the scale stands below them.
"""

from fisherop.plenoptic.figures import (
    display_eigendistortion,
    display_eigendistortion_all,
    eigendistortion_imshow_all,
    imshow,
)
from fisherop.plenoptic.synthesis import Eigendistortion, LoadWarning, remove_grad

__all__ = [
    "Eigendistortion",
    "LoadWarning",
    "display_eigendistortion",
    "display_eigendistortion_all",
    "eigendistortion_imshow_all",
    "imshow",
    "remove_grad",
]
