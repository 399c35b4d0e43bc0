"""The preflight: `minivla.doctor` looks for what fails silently before a robot does.

report.py        findings, and how they print
checkup.py       the list of checks, and how they are run
subject.py       what is examined: the policy, the raw batch and its mended form, dataset, environment
names.py, pictures.py, vectors.py    one input each: what is wrong with it, and how it is mended
recordings.py, scaling.py, running.py   a dataset, a normalisation, a policy, whoever made them
views.py         which way round a picture is, and from which camera
statistics.py, scales.py, observations.py, cameras.py, learning.py, probes.py, sampler.py, control.py,
motion.py        the checks
"""

from minivla.preflight.checkup import doctor
from minivla.preflight.report import Finding, Report

__all__ = ["Finding", "Report", "doctor"]
