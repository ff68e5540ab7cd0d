"""Many images, layers and models: a survey that keeps every finished cell, resumes, and ends in a table and a page.

>>> import tempfile, torch, fisherop as fo
>>> images = {"a": torch.rand(1, 1, 16, 16), "b": torch.rand(1, 1, 16, 16)}
>>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 4, 3))
>>> survey = fo.survey({"net": network}, images, ["0", "1", "2"], store=tempfile.mkdtemp())
>>> survey
<Survey of 6 cells: 6 done, 0 failed>
>>> survey.result("b", "1").converged
array([ True,  True])

From the bottom up: `cells` says what a cell is and names it by its content, `store` keeps cells in a folder, `work`
computes one in any process, `opened` reads them, `comparison` and `report` put them side by side, `run` is the call.
"""

from fisherop.surveys.opened import Failure, Survey
from fisherop.surveys.run import survey

__all__ = ["Failure", "Survey", "survey"]
