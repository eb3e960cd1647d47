"""What a compression will do: the section as the solver's rule and the checkpoint's settings, or why it cannot be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ctp_cli.checkpoints import writer
from ctp_cli.checkpoints.compressed_tensors import CompressedTensorsSettings
from ctp_cli.checkpoints.formats import LayerFormat
from ctp_cli.checkpoints.gptq import GPTQSettings
from ctp_cli.checkpoints.packed import PackedSettings
from ctp_cli.compression.grid import GridRule
from ctp_cli.compression.masks import MaskRule
from ctp_cli.compression.solver import SolverRule
from ctp_cli.errors import RecipeError
from ctp_cli.models.blocks import Block, LinearLayer, other_linears
from ctp_cli.recipe import CompressSection

AUTO_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Job:
    section: CompressSection
    rule: SolverRule
    settings: LayerFormat | None

    @property
    def format(self) -> str:
        return "dense" if self.settings is None else self.settings.name

    @classmethod
    def plan(cls, section: CompressSection, network: PreTrainedModel, blocks: Sequence[Block]) -> "Job":
        """All that can be refused is refused here, before anything is computed."""
        layers = [layer for block in blocks for layer in block.layers]
        rule = solver_rule(section, layers)
        if section.bits is None or section.stored_as == "dense":
            return cls(section, rule, None)
        grid = rule.grid
        assert grid is not None
        settings: LayerFormat
        common = (section.bits, grid.group_size or -1, section.symmetric)
        if section.stored_as == PackedSettings.name:
            run = (rule.mask.n, rule.mask.m) if rule.mask is not None and rule.mask.m else None
            settings = PackedSettings(*common, run)
        elif section.format == CompressedTensorsSettings.name:
            dense = other_linears(network, {layer.name for layer in layers})
            settings = CompressedTensorsSettings(*common, scale_dtype=grid.scale_dtype, dense=dense)
        else:
            settings = GPTQSettings(
                *common,
                desc_act=section.act_order == "column",
                dampening=section.dampening,
                true_sequential=section.true_sequential,
                static_groups=rule.static_grids,
                zero_offset=1 if section.symmetric else 0,
            )
        for layer in layers:
            out_features, in_features = layer.weight_OI.shape
            settings.check_layer(layer.name, out_features=out_features, in_features=in_features)
        return cls(section, rule, settings)

    def tuned_group_size(self, blocks: Sequence[Block]) -> int | None:
        """Groups of the grid; without one, the largest usual groups that fit, or whole rows."""
        if self.rule.grid is not None:
            return self.rule.grid.group_size
        widths = {layer.weight_OI.shape[1] for block in blocks for layer in block.layers}
        return next((size for size in AUTO_GROUP_SIZES if all(width % size == 0 for width in widths)), None)

    def write_shared_files(self, folder: Path, network: PreTrainedModel, tokenizer: Any) -> None:
        writer.write_index(folder, settings=self.settings)
        writer.write_configuration(folder, network, tokenizer, settings=self.settings)


def solver_rule(section: CompressSection, layers: Sequence[LinearLayer]) -> SolverRule:
    """The section as the solver's rule. Raises RecipeError naming a layer that a group size or n:m does not divide."""
    mask = None if section.sparsity is None else MaskRule.parse(section.sparsity)
    grid = None
    if section.bits is not None:
        group = _group_size(section.group_size, layers)
        rounded = section.format == CompressedTensorsSettings.name and layers[0].weight_OI.dtype == torch.bfloat16
        scale_dtype = torch.bfloat16 if rounded else torch.float16
        grid = GridRule(section.bits, group, section.symmetric, section.mse_clip, scale_dtype)
    common = math.gcd(*(layer.weight_OI.shape[1] for layer in layers))
    for layer in layers:
        in_features = layer.weight_OI.shape[1]
        for what, unit, least, instead in (
            ("compress.group_size: ", grid.group_size if grid else None, 8, "use --group-size row"),
            ("compress.sparsity: m = ", mask.m if mask else None, 2, "prune a fraction, e.g. --sparsity 0.5"),
        ):
            if unit and in_features % unit:
                fitting = [d for d in range(least, common + 1) if common % d == 0]
                nearest = min(fitting, key=lambda d: (abs(d - unit), -d), default=None)
                raise RecipeError(
                    f"{what}{unit} does not divide the {in_features} inputs of {layer.name}",
                    hint=instead if nearest is None else f"{nearest} divides those of every layer",
                )
    if mask and mask.m and grid and grid.group_size and grid.group_size % mask.m and mask.m % grid.group_size:
        raise RecipeError(
            f"compress: n:m runs of {mask.m} do not fit groups of {grid.group_size}",
            hint="make one divide the other",
        )
    return SolverRule(
        mask,
        grid,
        pruner=section.pruner,
        quantizer=section.quantizer,
        act_order=section.act_order,
        dampening=section.dampening,
        rounds=section.rounds,
        refine=section.refine,
    )


def _group_size(asked: str | int, layers: Sequence[LinearLayer]) -> int | None:
    if asked == "row":
        return None
    if isinstance(asked, int):
        return asked
    widths = [layer.weight_OI.shape[1] for layer in layers]
    for size in AUTO_GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise RecipeError(
        f"compress.group_size: none of {AUTO_GROUP_SIZES} divides every layer's inputs ({sorted(set(widths))})",
        hint="give --group-size row, or a size that divides them all",
    )
