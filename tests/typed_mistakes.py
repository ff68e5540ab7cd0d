"""Mistakes that types tell a user of; each line that mypy is to refuse names the error. Never run."""

import torch

import fisherop as fo


def mistakes() -> None:
    """Make them."""
    F = fo.FisherOperator("resnet18", torch.zeros(3))  # arg-type
    F = fo.FisherOperator(torch.nn.Identity(), [0.0, 1.0])  # arg-type
    fo.JacobianOperator(torch.nn.Identity(), torch.zeros(3), noise=fo.noise.Gaussian())  # call-arg
    result = fo.eigendistortions(F, k="two")  # arg-type
    fo.eigendistortions(F, maxiters=10)  # call-arg
    fo.eigendistortions(F, 2, "BE", "auto", 1e-6)  # call-arg
    print(result.eigenvector)  # attr-defined
    count: str = result.n_matvec  # assignment
    fo.eigendistortion(F, count)  # attr-defined
