"""The recipes by family: modules with the same functions, so that one script makes either model."""

from __future__ import annotations

from scripts.tiny import recipe, recipe_flux

FAMILIES = {"sd3": recipe, "flux": recipe_flux}
