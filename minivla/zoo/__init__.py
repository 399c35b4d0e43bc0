"""The recipes that trained the shipped checkpoints, and the checkpoints themselves.

`make zoo NAME=act-tabletop`, or `python -m minivla.zoo act-tabletop`, trains one again.
"""

from minivla.zoo.recipes import RECIPES as RECIPES
from minivla.zoo.recipes import Recipe as Recipe
from minivla.zoo.recipes import cook as cook
from minivla.zoo.recipes import measure as measure
