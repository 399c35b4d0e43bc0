"""What the doctor says: findings, and the report that holds them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

ERROR, WARNING = "error", "warning"
WIDTH = 100
THIN = "Too little was checked: most checks lacked an input, so finding nothing here means little."


class NotRun(Exception):
    """Raised by a check that lacks its input; its text says what is missing."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    code       its name, the same in every report: "image-range"
    severity   "error": do not start the robot; "warning": look, it may be meant
    where      the input, dimension or parameter it concerns
    what       what was seen, in one line;  mend: what to do, in one line
    detail     a table or lines to paste, where one line does not do
    """

    code: str
    severity: str
    where: str
    what: str
    mend: str
    detail: str = ""

    def __str__(self) -> str:
        lines = [f"{self.severity.upper():<9}{self.code} · {self.where}"]
        lines += _wrapped(self.what) + _wrapped(f"Mend: {self.mend}")
        return "\n".join(lines + ["           " + line for line in self.detail.splitlines()])


@dataclass(frozen=True)
class Report:
    """What `minivla.doctor` found; printing it shows everything.

    findings       errors first, each in the order of the checks
    passed         the checks that ran and found nothing
    not_run        {check: the input it lacks}; these were *not* passed
    measurements   {name: value}: sensitivities, replay error
    title          what was examined
    evidence       what the checks had to go by: samples, frames, an environment
    notes          what is as it should be and may surprise all the same
    """

    findings: tuple[Finding, ...] = ()
    passed: tuple[str, ...] = ()
    not_run: Mapping[str, str] = field(default_factory=dict)
    measurements: Mapping[str, float] = field(default_factory=dict)
    title: str = "minivla.doctor"
    evidence: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no error. Warnings, and checks that did not run, do not count."""
        return not any(finding.severity == ERROR for finding in self.findings)

    @property
    def is_thin(self) -> bool:
        """Whether most checks lacked an input, so that finding nothing means little."""
        return len(self.not_run) > len(self.passed) + len(self.codes)

    @property
    def codes(self) -> tuple[str, ...]:
        """The findings' codes, each once, errors first."""
        return tuple(dict.fromkeys(finding.code for finding in self.findings))

    def __str__(self) -> str:
        errors = sum(finding.severity == ERROR for finding in self.findings)
        counts = [_counted(errors, "error"), _counted(len(self.findings) - errors, "warning")]
        counts += [f"{len(self.passed)} checks passed", f"{len(self.not_run)} not run"]
        parts = [f"{self.title}: {', '.join(counts)}"]
        if self.is_thin:
            parts.append("\n".join(_wrapped(THIN)).strip())
        parts += map(str, self.findings)
        if self.notes:
            parts.append("noted    " + "\n".join(_wrapped("; ".join(self.notes)))[9:])
        if self.measurements:
            width = max(map(len, self.measurements))
            rows = [f"  {name:<{width}}  {_rounded(value)}" for name, value in self.measurements.items()]
            parts.append("\n".join(["measured", *rows]))
        if self.passed:
            seen = f" (seen: {self.evidence})" if self.evidence else ""
            parts.append("passed   " + "\n".join(_wrapped(", ".join(self.passed) + seen))[9:])
        if self.not_run:
            parts.append("\n".join(["not run", *_reasons(self.not_run)]))
        return "\n\n".join(parts)

    __repr__ = __str__


def sorted_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors before warnings, otherwise in the order given."""
    return tuple(sorted(findings, key=lambda finding: finding.severity != ERROR))


def _reasons(not_run: Mapping[str, str]) -> list[str]:
    """One entry for each reason, with all the checks it stopped."""
    by_reason: dict[str, list[str]] = {}
    for check, reason in not_run.items():
        by_reason.setdefault(reason, []).append(check)
    wrapper = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [wrapper.fill(f"{', '.join(checks)}: {reason}") for reason, checks in by_reason.items()]


def _wrapped(text: str) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 9)
    return wrapper.wrap(text)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _rounded(value: float) -> str:
    """Two significant digits: enough to judge by, and the same on every machine."""
    return f"{value:.2g}"
