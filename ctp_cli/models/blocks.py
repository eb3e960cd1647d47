"""Walk a decoder: find its blocks and their linear layers, and run one block at a time.

Nothing here knows a model family. Blocks are the ModuleList with as many members as the configuration has hidden
layers; a block's linear layers, their order of execution and which of them share an input are found by running it.
"""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ctp_cli.errors import UnsupportedModelError
from ctp_cli.models.activations import IN_MEMORY, Activations, Tensors


@dataclass(frozen=True)
class LinearLayer:
    """One weight matrix of a block. `name` is its path from the model's root."""

    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """GPT-2's Conv1D stores (in, out) where nn.Linear stores (out, in)."""
        return isinstance(self.module, Conv1D)

    @property
    def parameter(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter), type(weight)
        return weight

    @property
    def weight_OI(self) -> Tensor:
        """A view (out_features, in_features) of the weight."""
        return self.parameter.data.T if self.transposed else self.parameter.data

    def set_weight(self, weight_OI: Tensor) -> None:
        """Copy new values in, cast to the module's dtype."""
        self.weight_OI.copy_(weight_OI)


@dataclass(frozen=True)
class Block:
    """One decoder block and its linear layers, in the order in which the module lists them."""

    index: int
    name: str
    module: nn.Module
    layers: tuple[LinearLayer, ...]


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks in order. Raises UnsupportedModelError, naming what was looked for."""
    blocks = []
    for index, (name, module) in enumerate(block_modules(model).items()):
        layers = tuple(LinearLayer(f"{name}.{path}", linear) for path, linear in _linears(module).items())
        _refuse_other_matrices(type(model).__name__, name, module, layers)
        blocks.append(Block(index, name, module, layers))
    return blocks


def block_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder blocks by name, in order, whether their layers are dense or packed. Raises UnsupportedModelError."""
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = {name: m for name, m in lists.items() if len(m) == wanted and all(_holds_linears(block) for block in m)}
    if len(fitting) != 1 or not wanted:
        found = ", ".join(f"{name} ({len(m)} x {type(m[0]).__name__})" for name, m in lists.items() if len(m)) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__}: looked for one ModuleList of num_hidden_layers={wanted} decoder blocks that hold "
            f"nn.Linear or Conv1D layers; found: {found}",
            hint="ctp walks decoder-only models such as Llama, OPT, GPT-2, GPT-NeoX, BLOOM, Qwen, Mistral, Gemma, Phi",
        )
    ((prefix, members),) = fitting.items()
    return {f"{prefix}.{index}": module for index, module in enumerate(members)}


def copy_of(block: Block) -> Block:
    """The block as it is now, with weights of its own."""
    module = copy.deepcopy(block.module)
    modules = dict(module.named_modules())
    layers = tuple(LinearLayer(x.name, modules[x.name.removeprefix(f"{block.name}.")]) for x in block.layers)
    return Block(block.index, block.name, module, layers)


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def _holds_linears(block: nn.Module) -> bool:
    return any(hasattr(m, "in_features") and hasattr(m, "out_features") for m in block.modules()) or bool(
        _linears(block)
    )


def other_linears(model: PreTrainedModel, known: Collection[str]) -> tuple[str, ...]:
    """Names of linear layers that are not among the `known` ones, nor the head."""
    head = model.get_output_embeddings()
    return tuple(name for name, module in _linears(model).items() if module is not head and name not in known)


def _refuse_other_matrices(family: str, name: str, block: nn.Module, layers: tuple[LinearLayer, ...]) -> None:
    covered = {id(layer.parameter) for layer in layers}
    for path, parameter in block.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in covered:
            raise UnsupportedModelError(
                f"{family}: {name}.{path} has shape {tuple(parameter.shape)} and belongs to no nn.Linear or Conv1D "
                "(fused experts, convolutions and the like are not supported)",
                hint="compress a dense decoder-only model",
            )


@dataclass(frozen=True)
class BlockCall:
    """The arguments a model hands one block beside the hidden states, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, x_BTD: Tensor) -> Tensor:
        output = block(x_BTD, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple | list) else output


@dataclass
class WalkState:
    """Hidden states between two blocks, and every block's calls. keep_BT is False at padding."""

    hidden_BTD: Tensors
    calls: list[list[BlockCall]]
    """calls[block][batch]"""
    keep_BT: list[Tensor | None]
    activations: Activations = IN_MEMORY


@torch.no_grad()
def start_walk(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    activations: Activations = IN_MEMORY,
    open_block: Callable[[Block], object] = lambda block: None,
) -> WalkState:
    """Run the model up to its first block on every batch of (ids_BT, attention_mask_BT or None).

    Blocks are replaced by recorders that pass hidden states through, so that masks, positions and whatever else a
    family hands to its blocks, which may differ from block to block, are recorded as the model makes them. What a block
    returns is found by running the first of each class on a few tokens, for which `open_block` gives it its weights.
    """
    state = WalkState(activations.new(), [[] for _ in blocks], [], activations)
    originals = [block.module.forward for block in blocks]
    returns_tuple: dict[type[nn.Module], bool] = {}

    def passed_through(block: Block, x_BTD: Tensor) -> Any:
        return (x_BTD,) if returns_tuple[type(block.module)] else x_BTD

    def probe(block: Block, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if type(block.module) not in returns_tuple:
                open_block(block)
                returns_tuple[type(block.module)] = isinstance(original(hidden_states, *args, **kwargs), tuple | list)
            return passed_through(block, hidden_states)

        return forward

    def recorder(block: Block) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            state.calls[block.index].append(BlockCall(args, kwargs))
            if block.index == 0:
                state.hidden_BTD.append(hidden_states)
            return passed_through(block, hidden_states)

        return forward

    try:
        for block, original in zip(blocks, originals, strict=True):
            block.module.forward = probe(block, original)
        few = torch.zeros(1, 4, dtype=torch.long, device=next(model.get_input_embeddings().parameters()).device)
        # without the head: of logits, even the last position's alone can take longer than everything else here
        model.base_model(few, use_cache=False)
        for block in blocks:
            block.module.forward = recorder(block)
        for ids_BT, mask_BT in batches:
            model.base_model(ids_BT, attention_mask=mask_BT, use_cache=False)
            state.keep_BT.append(None if mask_BT is None else mask_BT.bool())
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.module.forward = original
    return state


class SuspendedRun:
    """One run of a block over all batches that stops at chosen layers, so that their weights can be changed midway.

    Every batch runs in a greenlet, which stops in front of each of `stops` and hands out that layer's inputs. When all
    batches stand there, the layer is compressed, and they go on with its new weights: a block whose layers see
    compressed predecessors (true-sequential) costs one forward pass instead of one for each set of layers.
    Memory: what a block holds between two layers, for all batches at once; where that is too much (`run_again` of the
    state's activations), a batch ends at each stop and starts over for the next one, with the same results.
    Greenlets share one thread, so grad mode and the like are the caller's: use it under torch.no_grad.
    """

    def __init__(self, block: Block, stops: Collection[str], state: WalkState) -> None:
        """`stops` are names of layers."""
        self._state, self._block = state, block
        self._runs = [greenlet(self._forward) for _ in state.hidden_BTD]
        self._waiting: list[tuple[str, Tensor] | None] = [None] * len(self._runs)
        self._taken: list[set[str]] = [set() for _ in self._runs]
        self._running = 0
        self._hooks = [
            layer.module.register_forward_pre_hook(lambda _m, inputs, name=layer.name: self._stop(name, inputs[0]))
            for layer in block.layers
            if layer.name in stops
        ]

    def _forward(self, batch: int) -> None:
        x_BTD = self._state.hidden_BTD[batch]
        self._state.hidden_BTD[batch] = self._state.calls[self._block.index][batch].run(self._block.module, x_BTD)

    def _stop(self, name: str, x: Tensor) -> None:
        if name in self._taken[self._running]:
            return
        main = getcurrent().parent
        assert main is not None
        main.switch((name, x))

    def _go_on(self, batch: int) -> None:
        run = self._runs[batch]
        if not run.dead:
            self._running = batch
            self._waiting[batch] = run.switch(batch)

    def inputs(self, layer: LinearLayer) -> Iterator[tuple[int, Tensor]]:
        """Bring every batch in front of `layer`; yield its number and its inputs (T, I), padding left out.

        A layer that a batch does not reach yields nothing for it.
        """
        for batch, keep_BT in enumerate(self._state.keep_BT):
            if self._waiting[batch] is None:
                self._go_on(batch)
            waiting = self._waiting[batch]
            if waiting is not None and waiting[0] == layer.name:
                self._waiting[batch] = None
                if self._state.activations.run_again:
                    self._taken[batch].add(layer.name)
                    self._runs[batch].throw()
                    self._runs[batch] = greenlet(self._forward)
                yield batch, flatten(waiting[1], keep_BT)

    @contextlib.contextmanager
    def watching(self, layer: LinearLayer, see: Callable[[int, Tensor], object]) -> Iterator[None]:
        """Call `see` with the number of the batch and the outputs (T, O) of `layer`, once for each, without padding."""
        seen: set[int] = set()

        def hook(_module: nn.Module, _inputs: object, y: Tensor) -> None:
            if self._running in seen:
                return
            seen.add(self._running)
            see(self._running, flatten(y, self._state.keep_BT[self._running]))

        handle = layer.module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def finish(self) -> None:
        """Let every batch run to its end; the hidden states are then the block's outputs."""
        for batch, run in enumerate(self._runs):
            while not run.dead:
                self._go_on(batch)

    def __enter__(self) -> "SuspendedRun":
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks and drop batches that did not finish."""
        for hook in self._hooks:
            hook.remove()
        for run in self._runs:
            if not run.dead:
                run.throw()


def flatten(x: Tensor, keep_BT: Tensor | None) -> Tensor:
    """(B, T, I) or (B*T, I) -> (tokens, I) without padding."""
    # some families flatten tokens before their layers
    flat_TI = x.reshape(-1, x.shape[-1])
    if keep_BT is None or keep_BT.all():
        return flat_TI
    return flat_TI[keep_BT.reshape(-1)]


@torch.no_grad()
def advance(block: Block, state: WalkState) -> None:
    """Replace the hidden states by the block's outputs, batch by batch."""
    for batch, x_BTD in enumerate(state.hidden_BTD):
        state.hidden_BTD[batch] = state.calls[block.index][batch].run(block.module, x_BTD)


@torch.no_grad()
def shared_inputs(block: Block, state: WalkState) -> list[list[LinearLayer]]:
    """The block's layers in order of execution, those fed by the very same tensor together.

    Layers that the probe does not reach come last, each alone.
    """
    order: list[tuple[Tensor, list[LinearLayer]]] = []

    def see(layer: LinearLayer, inputs: tuple[Tensor, ...]) -> None:
        for seen, members in order:
            if seen is inputs[0]:
                members.append(layer)
                return
        order.append((inputs[0], [layer]))

    hooks = [
        layer.module.register_forward_pre_hook(lambda _m, inputs, layer=layer: see(layer, inputs))
        for layer in block.layers
    ]
    try:
        state.calls[block.index][0].run(block.module, state.hidden_BTD[0])
    finally:
        for hook in hooks:
            hook.remove()
    reached = {layer.name for _, members in order for layer in members}
    return [members for _, members in order] + [[layer] for layer in block.layers if layer.name not in reached]


@torch.no_grad()
def residual_writers(block: Block, state: WalkState, sets: Sequence[Sequence[LinearLayer]]) -> list[LinearLayer]:
    """The layers whose outputs the block adds to its hidden states, if it does nothing else to them.

    In most families the block's output is its input plus the outputs of attention's and the MLP's last layers, which
    is found by running it: equal but for rounding. Where norms or factors come between (OPT-350m, Gemma 2), the list is
    empty.
    """
    x_BTD = state.hidden_BTD[0]
    candidates = [layers[0] for layers in sets if len(layers) == 1 and layers[0].weight_OI.shape[0] == x_BTD.shape[-1]]
    written: list[Tensor] = []
    hooks = [layer.module.register_forward_hook(lambda _m, _inputs, y: written.append(y)) for layer in candidates]
    try:
        out_BTD = state.calls[block.index][0].run(block.module, x_BTD)
    finally:
        for hook in hooks:
            hook.remove()
    parts = [x_BTD.float(), *(y.float().view_as(x_BTD) for y in written)]
    rounding = torch.finfo(x_BTD.dtype).eps * len(parts) * torch.stack([part.abs() for part in parts]).sum(0)
    adds_up = (out_BTD.float() - torch.stack(parts).sum(0)).abs() <= rounding
    return candidates if bool(adds_up.all()) else []
