"""How much of this machine's memory may be spent on speed."""

import psutil

_SHARE = 0.5
"""Of the memory that is free now: activations need some, too."""


def fits_comfortably(wanted_bytes: float) -> bool:
    """Whether so many bytes may be taken where something works without them, only slower."""
    return bool(wanted_bytes <= _SHARE * psutil.virtual_memory().available)
