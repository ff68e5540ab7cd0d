"""Hypothesis profiles, and one thread: the small models here gain nothing from more."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
