"""Inputs as an enemy or a broken disk would make them: recipes, prompt files, checkpoints and texts, mutated by a seed.

`Inputs` makes whole ones, `mutant` damages one of them in a folder and says which command is to read it, `judge` runs
that command as the shell would and says what went wrong. A mutant may be harmless; then the command succeeds.
"""

import random
from collections.abc import Callable
from pathlib import Path

from hostile.checkpoints import checkpoint_mutant
from hostile.inputs import Inputs, Mutant
from hostile.judging import Verdict, judge
from hostile.prompts import prompt_mutant
from hostile.recipes import recipe_mutant
from hostile.texts import text_mutant

__all__ = ["KINDS", "Inputs", "Mutant", "Verdict", "judge", "mutant"]

_MAKERS: dict[str, Callable[[random.Random, Inputs, Path], Mutant]] = {
    "recipes": recipe_mutant,
    "prompts": prompt_mutant,
    "checkpoints": checkpoint_mutant,
    "texts": text_mutant,
}
KINDS = tuple(_MAKERS)


def mutant(kind: str, draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    """Put a damaged input into the folder `place`, which becomes the current one of the command."""
    return _MAKERS[kind](draw, inputs, place)
