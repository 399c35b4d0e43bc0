"""Tabletop: an embedded world of a table, grippers, coloured blocks and goals, and tasks in one sentence.

spec.py            colours, sizes, speeds; ActionSpec
scene.py           the things on the table, and how grippers move them
language.py        instructions, and which word combinations are held out
embodiments.py     cartesian, arm2, bimanual: what an action means
tasks.py           reach, push, pick_place, detour, sort: what an episode starts with
render.py          pictures
tabletop.py        the gymnasium environment, "minivla/Tabletop-v0"
experts.py         scripted experts
demonstrations.py  their episodes, as a dataset in memory
corrections.py     the expert going on where a policy has got to (DAgger)
recording.py       the same on disk, as a LeRobotDataset
"""

import gymnasium

from minivla.world.corrections import corrections
from minivla.world.demonstrations import Demonstrations, demonstrations
from minivla.world.embodiments import EMBODIMENTS
from minivla.world.experts import expert
from minivla.world.language import VOCABULARY
from minivla.world.recording import record
from minivla.world.spec import ActionSpec
from minivla.world.tabletop import Tabletop
from minivla.world.tasks import TASKS

__all__ = [
    "EMBODIMENTS",
    "TASKS",
    "VOCABULARY",
    "ActionSpec",
    "Demonstrations",
    "Tabletop",
    "corrections",
    "demonstrations",
    "expert",
    "record",
]

if "minivla/Tabletop-v0" not in gymnasium.registry:
    gymnasium.register("minivla/Tabletop-v0", entry_point="minivla.world.tabletop:Tabletop")
