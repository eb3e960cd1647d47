"""`import ctp_cli.integration` lets transformers load checkpoints of format ctp, packed weights staying packed."""

from ctp_cli.integration.quantizer import CtpConfig, CtpQuantizer

__all__ = ["CtpConfig", "CtpQuantizer"]
