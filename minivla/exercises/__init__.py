"""Self-checks for the chapters' exercises, one module a chapter.

A check runs the reader's function on small inputs and prints one line: "not attempted yet", what disagrees
first, or "correct". Each check is itself under test: it accepts the solution in the notebook and rejects a
plausible mistake.
"""

from minivla.exercises.verdict import verdict as verdict
