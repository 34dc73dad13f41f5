"""Data selection by metagradient descent: `mgd recipe select`, and the same for trainings of your own."""

from mgd.recipes.select.descend import Selection, select
from mgd.recipes.select.draws import Draws, draw
from mgd.recipes.select.exchange import Exchange
from mgd.recipes.select.problem import SelectionProblem

__all__ = ["Draws", "Exchange", "Selection", "SelectionProblem", "draw", "select"]
