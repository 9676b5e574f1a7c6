"""Check that an installed wheel is complete. Run it outside the repository, in an environment with only the wheel."""

import importlib.resources
from importlib.metadata import distribution

import pyterrier as pt

import pyterrier_msft
from pyterrier_msft import Contrastive, Distillation, MonoCE

files = importlib.resources.files(pyterrier_msft)
assert "site-packages" in str(files), files
assert (files / "py.typed").is_file()
assert (files / "pt_docs" / "index.rst").is_file()
assert (files / "templates" / "report.html").is_file()
for name in pyterrier_msft.__all__:
    if name != "plots":  # needs the extra [plot]
        getattr(pyterrier_msft, name)
for entry in distribution("pyterrier-msft").entry_points:
    entry.load()
assert len(pt.get_dataset("pydocs:train").get_topics()) > 0
print(MonoCE(fitter=Contrastive() >> Distillation()))
