"""The recipes that trained the shipped checkpoints, and the checkpoints themselves.

`make zoo NAME=act-tabletop`, or `python -m minivla.zoo act-tabletop`, trains one again.
"""

from minivla.zoo.cooking import cook as cook
from minivla.zoo.measuring import experiment as experiment
from minivla.zoo.measuring import measure as measure
from minivla.zoo.measuring import measured as measured
from minivla.zoo.recipes import RECIPES as RECIPES
from minivla.zoo.recipes import Recipe as Recipe
