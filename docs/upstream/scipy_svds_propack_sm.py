"""Report for SciPy: `svds(solver="propack", which="SM")` returns zeros for a matrix that has no small singular value.

Run it: it prints what SciPy says beside the dense answer, and exits with 1 where the fault is there. Seen with SciPy
1.15.3, 1.17.1 and 1.18.1 on Linux x86-64; dense, sparse and operator input alike; no error and no warning from Python.
The answer comes after some 19 000 products with A, although `maxiter` is 20 by default. With `maxiter=200` one of the
two values is right, the other is 0 with a vector of zeros. `solver="arpack"` is right, and so is `which="LM"`.
"""

import sys

import numpy as np
import scipy
from scipy.sparse.linalg import svds

A = np.random.default_rng(0).standard_normal((60, 40))
exact = np.linalg.svd(A, compute_uv=False)[:-3:-1]
_, found, vt = svds(A, k=2, which="SM", solver="propack", rng=np.random.default_rng(0))
print("SciPy", scipy.__version__)
print("the smallest singular values:", exact)
print("svds says:                   ", found)
print("and |A v| for its vectors:   ", np.linalg.norm(A @ vt.T, axis=0))
sys.exit(not np.allclose(np.sort(found), exact))
