"""Recipes: `qat.get("ste")` has `prepare(params, assignment)` and `convert(params)`."""

from lowbit.qat.base import Recipe as Recipe
from lowbit.qat.base import get as get
from lowbit.qat.base import names as names
