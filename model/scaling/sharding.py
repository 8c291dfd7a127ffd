"""Split the language model over the processes of a run (`--shard_model`), with PyTorch's `fully_shard` (FSDP2).

Every process keeps an equal share of the rows of every weight. A block is gathered whole when it is about to run, and
let go afterwards; embedding, last norm and language head are gathered together, from the forward pass to the backward
pass. Tower and projector stay whole on every process.

Nothing is ever loaded whole: the model is built hollow, as shapes without memory, gets its LoRA layers, is split, and
each process then reads its own rows from the mapped files. A layer that takes 4 bits is read whole and packed, and the
process keeps its share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen import QWenConfig

from ..checkpoints.base_models import each_weight
from ..language_models.causal_lm import check_suitable
from .quantised import is_4bit, pack

_OPTIMIZERS = "adamw_torch_fused", "adamw_torch", "sgd"
"""Those whose state is either a number or of its parameter's shape."""


# ---- Split it


def _give_memory(module: nn.Module, device: torch.device) -> None:
    """Allocate the weights of a hollow module that are not split yet; their values are undefined."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and not parameter.is_contiguous():
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)


def shard(model: Any, device: torch.device) -> None:
    """Split the language model of a hollow `VisionLanguageModel`, LoRA included, and read its weights; in place.

    Every process of the run must call it; what is trained must have been added and drawn from one seed.

    Raises:
        ValueError: if the files lack weights, or it has no blocks to be split by.
    """
    if not dist.is_initialized():  # a single process without torchrun
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model.vision_tower.to(device)
    model.projector.to(device)
    root = model.qwen
    blocks = [module for module in root.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"--shard_model: {type(root).__name__} has no blocks that it could be split by; leave it out")
    for module in (*blocks, root):  # the root takes what is left: embedding, last norm and language head
        _give_memory(module, device)
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not root)
    # Training calls `hidden_at` and then the head, so both must find the root's weights gathered.
    register_fsdp_forward_method(root, "hidden_at")
    # The order of what processes send each other follows the graph, which must not depend on a batch having images.
    root.get_input_embeddings().register_forward_hook(_require_grad)
    model.language_model.register_load_state_dict_pre_hook(_split_what_is_loaded)
    fill(root, str(root.name_or_path))
    if not isinstance(root.config, QWenConfig):
        check_suitable(root)
        root.reshard()


def _require_grad(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.requires_grad_() if torch.is_grad_enabled() else out


def fill(root: nn.Module, name_or_path: str) -> None:
    """Copy each process's rows of the weights in a folder's files to a language model that is split; LoRA stays.

    Raises:
        ValueError: if a weight is missing or has another shape.
    """
    root.reshard()  # type: ignore[operator]
    wanted: dict[str, Any] = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in root.named_parameters()
        if "lora_" not in name
    }
    modules = root.named_modules()
    in_4_bits = {f"{name.replace('.base_layer', '')}.weight": layer for name, layer in modules if is_4bit(layer)}
    problems = []
    for name, value in each_weight(name_or_path):  # mapped: only the rows that are copied are read
        parameter, layer = wanted.pop(name, None), in_4_bits.get(name)
        if parameter is None:
            continue
        shape = parameter.shape if layer is None else (layer.out_features, layer.in_features)
        if value.shape != shape:
            problems.append(f"{name}: {tuple(value.shape)}, expected {tuple(shape)}")
            continue
        if layer is not None:  # its scales take the whole weight
            value = pack(layer, value, parameter.device)
        parameter.detach().to_local().copy_(own_rows(value, parameter))
    problems += [f"{name}: missing" for name in sorted(wanted)]
    if problems:
        raise ValueError(
            f"base language model {name_or_path!r}: {len(problems)} of its weights can't be read in shares "
            f"({'; '.join(problems[:3])}{'; …' * (len(problems) > 3)}): check that the folder is complete, or leave "
            "--shard_model out"
        )


def own_rows(value: Tensor, parameter: DTensor) -> Tensor:
    """Return the rows of a whole tensor that are this process's share of a parameter."""
    size, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    rows = -(-len(value) // size)  # of every process but the last ones
    return value[rank * rows : (rank + 1) * rows]


def split(value: Tensor, parameter: DTensor) -> DTensor:
    """Return a whole tensor, which every process has, split as a parameter of its shape is."""
    local = own_rows(value, parameter).to(parameter.device, copy=True).contiguous()
    placed = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, *placed, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _split_what_is_loaded(module: nn.Module, values: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let `load_state_dict` take whole tensors."""
    module.get_base_model().reshard() if hasattr(module, "get_base_model") else module.reshard()  # type: ignore[operator]
    for name, parameter in module.named_parameters():
        value = values.get(prefix + name)
        if isinstance(parameter, DTensor) and value is not None and value.shape == parameter.shape:
            values[prefix + name] = split(value, parameter)


# ---- Gather it


def gather_weights(model: Any, *, keep: bool) -> dict[str, Tensor]:
    """Gather what is trained of the language model on the CPU of the processes that keep it; all must call it."""
    model.qwen.reshard()
    values = model.language_model.state_dict(keep_vars=True).items()
    return _gathered(
        {name: value for name, value in values if not isinstance(value, nn.Parameter) or value.requires_grad}, keep
    )


def gather_optimizer(optimizer: Any, *, keep: bool) -> dict[str, Any]:
    """Gather an optimizer's `state_dict()` as it were for weights that are not split; all processes must call it."""
    whole = optimizer.state_dict()
    states = {number: _gathered(state, keep) for number, state in whole["state"].items()}
    return {**whole, "state": states}


def _gathered(values: dict[str, Any], keep: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            value = value.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            found[name] = whole.cpu() if isinstance(value, DTensor) else whole
    return found


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Average the gradients of a module that every process has whole; all must call it after a backward pass."""
    if (size := dist.get_world_size()) == 1:
        return
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= size
    for parameter, mean in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)


@contextlib.contextmanager
def calls_together(root: Any) -> Iterator[None]:
    """Let each process call a split language model as often as it needs to; all must enter.

    A call gathers weights, so every process has to take part: one that has made all its own calls joins those of the
    others, with a single token. One that fails joins no more; torchrun then ends them all.
    """

    def someone_calls(this_one: bool) -> bool:
        number = torch.tensor(int(this_one), device=root.device)
        dist.all_reduce(number)
        return bool(number)

    # Before FSDP's own hook, which gathers.
    hook = root.register_forward_pre_hook(lambda *args: someone_calls(True) and None, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=root.device)
    with torch.no_grad():
        while someone_calls(False):
            root(input_ids=token)
    root.reshard()


def check_shardable(args: Any) -> None:
    """Refuse flags that `--shard_model` can't be combined with.

    Raises:
        ValueError: with what to do instead.
    """
    optimizer = str(getattr(args.optim, "value", args.optim))
    advice = {
        "MPS": (args.device.type == "mps", "it can't exchange weights; leave --shard_model out"),
        "--fp16 true": (args.fp16, "its scaler can't take split gradients; give --bf16 true, or --fp16 false"),
        "--torch_compile": (args.torch_compile, "blocks are gathered between its graphs; leave one of them out"),
        f"--optim {optimizer}": (optimizer not in _OPTIMIZERS, f"take {', '.join(_OPTIMIZERS)}"),
    }
    for name, (is_wrong, reason) in advice.items():
        if is_wrong:
            raise ValueError(f"--shard_model and {name} do not go together: {reason}")
