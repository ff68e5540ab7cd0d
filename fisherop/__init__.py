"""Fisher information of PyTorch models at an image, and the distortions that a model notices most and least."""

from fisherop import noise as noise
from fisherop.eigen import eigendistortions as eigendistortions
from fisherop.operators import FisherOperator as FisherOperator
from fisherop.operators import JacobianOperator as JacobianOperator
from fisherop.result import ConvergenceWarning as ConvergenceWarning
from fisherop.result import Eigendistortions as Eigendistortions

__version__ = "0.1.0"
