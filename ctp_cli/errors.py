"""What can go wrong for a user: each error says what, where, and what to do next.

`exit_code` is what the `ctp` process returns; the full table of codes stands in the README.
"""


class CtpError(Exception):
    """A mistake or obstacle the user can act on. `hint` says how; it is printed on a line of its own."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(CtpError):
    """A recipe or a command-line option that is unknown, of the wrong type or out of range."""


class InputError(CtpError):
    """A file, model, text or prompt that is missing, damaged or does not fit."""


class NotFiniteError(InputError):
    """A model's outputs, or a prompt being learned, are NaN or infinite or as good as that."""


class UnknownTokenError(InputError):
    """A text with token ids that the model's embedding table has no rows for."""


class NetworkError(InputError):
    """Something had to be fetched and could not be."""


class UnsupportedModelError(InputError):
    """A model whose structure the block walk does not recognize."""


class OutputError(CtpError):
    """The output exists, or belongs to a run with other settings."""


class ShapeError(InputError):
    """Tensors whose shapes do not go together."""


class UnfinishedError(CtpError):
    """Work that stopped for a reason outside of it (disk full, lost worker) and can be resumed."""

    exit_code = 3


class SolverError(UnfinishedError):
    """A layer's equations could not be solved; the layer is named."""


class GateFailedError(CtpError):
    """The work finished, but a gate the user set (`--max-ppl`, ...) was not met."""

    exit_code = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, CUDA's, and torch's words for the CPU's."""
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
