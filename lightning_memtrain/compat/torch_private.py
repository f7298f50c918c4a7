"""What torch keeps private and this library uses: every name, what for, and since when.

Each is looked up when somebody imports it from here for the first time, so that whoever does not need it need
not have it. Whoever uses one that is missing is told which releases of torch have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_memtrain.compat.private_names import (
    NewerName,
    PrivateAttribute,
    PrivateMethod,
    PrivateName,
    refuse,
)

if TYPE_CHECKING:  # those that are inherited from, or told apart by their type
    from torch._C import DispatchKey
    from torch._ops import OpOverload
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
        UnsupportedOperatorException,
    )
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
    from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
    from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
    from torch.utils._pytree import (
        TreeSpec,
        tree_flatten,
        tree_leaves,
        tree_map,
        tree_map_only,
        tree_unflatten,
    )

    _F = TypeVar("_F", bound=Callable[..., Any])

    current_graph_task_id: Callable[[], int]
    storage_key: Callable[[Any], int]
    version_counter: Callable[[Any], int]

    def disable_dynamo(function: _F) -> _F: ...


__all__ = [
    "BatchNorm",
    "ConvNd",
    "ConvTransposeNd",
    "DataDependentOutputException",
    "DispatchKey",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "NormBase",
    "OpOverload",
    "TorchDispatchMode",
    "TreeSpec",
    "UnsupportedOperatorException",
    "active_ddp_module",
    "can_ask_for_cpu_events",
    "fsdp_parameters",
    "gradients_of_fsdp_parameter",
    "is_backward_running",
    "is_traceable_wrapper_subclass",
    "schema_of",
    "skip_in_dynamo",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
]

_DISPATCH = "torch.utils._python_dispatch"
_PYTREE = "torch.utils._pytree"
_FAKES = "torch._subclasses.fake_tensor"
_AUTOGRAD = "torch._C._autograd"
_WATCH = "see the operators of a step"
_BATCHES = "look into batches and outputs"
_BACKWARD = "tell which backward is running"
_DRY_RUN = "run a step on tensors without data"
_CPU_EVENTS = "ask torch's profiler for the CPU allocator's events"
#: Optimizers that wrap another one and do without the constructor of their class lack it.
LOAD_STATE_DICT_HOOKS = "_optimizer_load_state_dict_post_hooks"
_TWIN = "predict what a GPU will need"
_RANK = "predict what one rank of several will need"
_COMPILED = "count what compiled code allocates"
_DDP = "follow what DistributedDataParallel does"
_FSDP = "find the weights that FSDP2 gathers"
_HOOKS = "call an optimizer's hooks once a step"

_NAMES: dict[str, PrivateName | PrivateAttribute | PrivateMethod | NewerName] = {
    # Operators
    "TorchDispatchMode": PrivateName(_DISPATCH, "TorchDispatchMode", _WATCH),
    "is_traceable_wrapper_subclass": PrivateName(
        _DISPATCH, "is_traceable_wrapper_subclass", "find the tensors inside of others"
    ),
    "disable_current_modes": PrivateName(_DISPATCH, "_disable_current_modes", "hide what runs from a ledger"),
    "get_current_dispatch_mode_stack": PrivateName(_DISPATCH, "_get_current_dispatch_mode_stack", _WATCH),
    "pop_mode": PrivateName(_DISPATCH, "_pop_mode", _WATCH),
    "push_mode": PrivateName(_DISPATCH, "_push_mode", _WATCH),
    "len_torch_dispatch_stack": PrivateName("torch._C", "_len_torch_dispatch_stack", _WATCH),
    "get_dispatch_stack_at": PrivateName("torch._C", "_get_dispatch_stack_at", _WATCH),
    "DisableTorchDispatch": PrivateName("torch._C", "_DisableTorchDispatch", "hide what runs from a ledger"),
    "DisableTorchFunction": PrivateName("torch._C", "DisableTorchFunction", "read tensors of any class"),
    "DisableTorchFunctionSubclass": PrivateName(
        "torch._C", "DisableTorchFunctionSubclass", "compute with sparse weights"
    ),
    "DispatchKeySet": PrivateName("torch._C", "DispatchKeySet", _TWIN),
    "ExcludeDispatchKeyGuard": PrivateName("torch._C", "_ExcludeDispatchKeyGuard", _TWIN),
    "privateuse1_backend_name": PrivateName("torch._C", "_get_privateuse1_backend_name", _TWIN),
    "set_up_python_backend": NewerName(
        "torch.utils.backend_registration",
        "_setup_privateuseone_for_python_backend",
        _TWIN,
        since=(2, 13),
        without=None,
    ),
    "use_count_of": PrivateMethod("torch:Tensor", "_use_count", _TWIN),
    "storage_use_count": PrivateName("torch._C", "_storage_Use_Count", _TWIN),
    "swap_tensor_impl": PrivateName("torch._C", "_swap_tensor_impl", _TWIN),
    "is_view": PrivateMethod("torch:Tensor", "_is_view", _TWIN),
    "DispatchKey": PrivateName("torch._C", "DispatchKey", "compute with sparse weights"),
    "OpOverload": PrivateName("torch._ops", "OpOverload", "name operators"),
    "function_of_operator": PrivateAttribute("torch._ops:OpOverload", "_op", _WATCH),
    "operator_schema": PrivateAttribute("torch._ops:OpOverload", "_schema", "see what operators write to"),
    # Tensors and their memory
    "storage_key": PrivateAttribute("torch:UntypedStorage", "_cdata", "tell storages apart"),
    "view_base": PrivateAttribute("torch:Tensor", "_base", "tell whose view a tensor is"),
    "version_counter": PrivateAttribute("torch:Tensor", "_version", "see that a tensor was written to"),
    "make_wrapper_subclass": PrivateName(
        "torch:Tensor", "_make_wrapper_subclass", "show sparse weights as tensors of their dense shape"
    ),
    "make_subclass": PrivateName("torch:Tensor", "_make_subclass", "see the activations that are kept"),
    "preserve_version_counter": PrivateName(
        "torch.autograd.grad_mode", "_unsafe_preserve_version_counter", "set tensors back without a trace"
    ),
    "foreach_copy_": PrivateName("torch", "_foreach_copy_", "copy many tensors at once"),
    # Batches
    "TreeSpec": PrivateName(_PYTREE, "TreeSpec", _BATCHES),
    "tree_flatten": PrivateName(_PYTREE, "tree_flatten", _BATCHES),
    "tree_leaves": PrivateName(_PYTREE, "tree_leaves", _BATCHES),
    "tree_map": PrivateName(_PYTREE, "tree_map", _BATCHES),
    "tree_map_only": PrivateName(_PYTREE, "tree_map_only", _BATCHES),
    "tree_unflatten": PrivateName(_PYTREE, "tree_unflatten", _BATCHES),
    # Autograd
    "current_graph_task_id": PrivateName("torch._C", "_current_graph_task_id", _BACKWARD),
    "current_autograd_node": PrivateName("torch._C", "_current_autograd_node", _BACKWARD),
    "next_sequence_number": PrivateName(_AUTOGRAD, "_get_sequence_nr", "tell which module a gradient is of"),
    "sequence_number_of": PrivateMethod(
        "torch._C:_functions.AccumulateGrad", "_sequence_nr", "tell which module a gradient is of"
    ),
    "push_saved_tensors_hooks": PrivateName(
        _AUTOGRAD, "_push_saved_tensors_default_hooks", "see the activations that are kept"
    ),
    "pop_saved_tensors_hooks": PrivateName(
        _AUTOGRAD, "_pop_saved_tensors_default_hooks", "see the activations that are kept"
    ),
    "top_saved_tensors_hooks": NewerName(
        _AUTOGRAD,
        "_top_saved_tensors_default_hooks",
        "see the activations that are kept beside other hooks",
        since=(2, 8),
        without=lambda tracing: None,
    ),
    # Dry runs
    "FakeTensor": PrivateName(_FAKES, "FakeTensor", _DRY_RUN),
    "FakeTensorMode": PrivateName(_FAKES, "FakeTensorMode", _DRY_RUN),
    "dispatch_keys_of": PrivateName("torch._C", "_dispatch_keys", _DRY_RUN),
    "refuse_data_pointer": PrivateName("torch._C", "_set_throw_on_mutable_data_ptr", _DRY_RUN),
    "warn_of_data_pointer": PrivateName("torch._C", "_set_warn_deprecated_on_mutable_data_ptr", _DRY_RUN),
    "allows_data_pointer": PrivateAttribute(
        f"{_FAKES}:FakeTensorMode", "_allow_unsafe_data_ptr_access", _DRY_RUN
    ),
    "get_dispatch_mode": PrivateName("torch._C", "_get_dispatch_mode", _TWIN),
    "TorchDispatchModeKey": PrivateName("torch._C", "_TorchDispatchModeKey", _TWIN),
    "DataDependentOutputException": PrivateName(_FAKES, "DataDependentOutputException", _DRY_RUN),
    "DynamicOutputShapeException": PrivateName(_FAKES, "DynamicOutputShapeException", _DRY_RUN),
    "UnsupportedOperatorException": PrivateName(_FAKES, "UnsupportedOperatorException", _DRY_RUN),
    # Modules
    "BatchNorm": PrivateName("torch.nn.modules.batchnorm", "_BatchNorm", "find batch normalisation"),
    "NormBase": PrivateName("torch.nn.modules.batchnorm", "_NormBase", "find running statistics"),
    "ConvNd": PrivateName("torch.nn.modules.conv", "_ConvNd", "find convolutions"),
    "ConvTransposeNd": PrivateName("torch.nn.modules.conv", "_ConvTransposeNd", "find convolutions"),
    "check_input_dim": PrivateAttribute(
        "torch.nn:BatchNorm2d", "_check_input_dim", "refuse what batch normalisation refuses"
    ),
    "output_padding_of": PrivateAttribute(
        "torch.nn.modules.conv:_ConvTransposeNd", "_output_padding", "compute sparse transposed convolutions"
    ),
    "padding_twice_of": PrivateAttribute(
        "torch.nn.modules.conv:_ConvNd", "_reversed_padding_repeated_twice", "compute sparse convolutions"
    ),
    "forward_hooks": PrivateAttribute("torch.nn:Module", "_forward_hooks", "take hooks off in any order"),
    "forward_pre_hooks": PrivateAttribute(
        "torch.nn:Module", "_forward_pre_hooks", "take hooks off in any order"
    ),
    "forward_hooks_always_called": PrivateAttribute(
        "torch.nn:Module", "_forward_hooks_always_called", "take hooks off in any order"
    ),
    # Optimizers
    "default_to_fused_or_foreach": PrivateName(
        "torch.optim.optimizer", "_default_to_fused_or_foreach", "foresee what an optimizer's step allocates"
    ),
    "types_with_foreach": PrivateName("torch.optim.optimizer", "_foreach_supported_types", _TWIN),
    "types_with_foreach_norms": PrivateName("torch.utils._foreach_utils", "_foreach_supported_types", _TWIN),
    "global_optimizer_pre_hooks": PrivateName("torch.optim.optimizer", "_global_optimizer_pre_hooks", _HOOKS),
    "global_optimizer_post_hooks": PrivateName(
        "torch.optim.optimizer", "_global_optimizer_post_hooks", _HOOKS
    ),
    "optimizer_step_pre_hooks": PrivateAttribute(
        "torch.optim:Optimizer", "_optimizer_step_pre_hooks", _HOOKS
    ),
    "optimizer_step_post_hooks": PrivateAttribute(
        "torch.optim:Optimizer", "_optimizer_step_post_hooks", _HOOKS
    ),
    "load_state_dict_post_hooks": PrivateAttribute(
        "torch.optim:Optimizer", LOAD_STATE_DICT_HOOKS, "keep the types of optimizer state"
    ),
    "per_optimizer_states": PrivateAttribute(
        "torch.amp:GradScaler", "_per_optimizer_states", "scale losses for gradients in float16"
    ),
    # Several processes
    "sync_ddp_buffers": PrivateAttribute(
        "torch.nn.parallel:DistributedDataParallel", "_sync_buffers", "send buffers once a batch"
    ),
    "set_params_and_buffers_to_ignore_for_model": PrivateName(
        "torch.nn.parallel:DistributedDataParallel",
        "_set_params_and_buffers_to_ignore_for_model",
        "keep sparse weights out of DistributedDataParallel's buckets",
    ),
    "zeros_like_grad_buckets": PrivateAttribute(
        "torch.distributed:Reducer", "_get_zeros_like_grad_buckets", _DDP
    ),
    "work_of_future": PrivateName("torch._C._distributed_c10d", "_create_work_from_future", _RANK),
    "distributed_world": PrivateName("torch.distributed.distributed_c10d", "_world", _RANK),
    # Compiled code
    "eval_frame": NewerName(
        "torch._C._dynamo", "eval_frame", "keep the compiler out of a function", since=(2, 6), without=None
    ),
    "dynamo_guards": PrivateName("torch._C._dynamo", "guards", _COMPILED),
    "inductor_cpp_settings": PrivateName(
        "torch._inductor.config", "cpp", "tell whether there is a compiler for C++"
    ),
    "disable_dynamo": PrivateName("torch", "_disable_dynamo", "keep the compiler out of a function"),
    # What the ledger counts by
    "profiler_enabled": PrivateName(_AUTOGRAD, "_profiler_enabled", _CPU_EVENTS),
    "enable_profiler_legacy": PrivateName(_AUTOGRAD, "_enable_profiler_legacy", _CPU_EVENTS),
    "disable_profiler_legacy": PrivateName(_AUTOGRAD, "_disable_profiler_legacy", _CPU_EVENTS),
    "ProfilerConfig": PrivateName("torch._C._profiler", "ProfilerConfig", _CPU_EVENTS),
    "ProfilerState": PrivateName("torch._C._profiler", "ProfilerState", _CPU_EVENTS),
    "ExperimentalProfilerConfig": PrivateName("torch._C._profiler", "_ExperimentalConfig", _CPU_EVENTS),
}


def is_backward_running() -> bool:
    """Whether autograd is running a backward in this thread.

    Returns:
        ``True`` within hooks and functions that a backward calls.

    Example:
        >>> is_backward_running()
        False
    """
    return bool(_name("current_graph_task_id")() != -1)


def schema_of(operator: Any) -> Any:
    """What an operator takes, returns and writes to; ``None`` for one that operators are handed to."""
    return _name("operator_schema")(operator) if hasattr(operator, "_schema") else None


def step_hook_names() -> tuple[str, str]:
    """Attributes in which an optimizer keeps the hooks before and after its step.

    Optimizers that wrap another one and do without the constructor of their class have neither.
    """
    _name("optimizer_step_pre_hooks"), _name("optimizer_step_post_hooks")
    return "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"


def note_step(optimizer: Optimizer) -> None:
    """Let schedulers know that an optimizer has stepped, if they asked to."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        optimizer._opt_called = True  # type: ignore[attr-defined]


def can_ask_for_cpu_events() -> bool:
    """Whether this torch tells what its CPU allocator does; without, a CPU has no truth beside the ledger."""
    return hasattr(torch._C._autograd, "_enable_profiler_legacy")


def skip_in_dynamo(*functions: Callable[..., Any]) -> bool:
    """Have ``torch.compile`` leave functions and all that they call alone.

    Args:
        *functions: of Python.

    Returns:
        Whether this torch can; 2.5 cannot.
    """
    eval_frame = _name("eval_frame")
    if eval_frame is None:
        return False
    try:
        skip = eval_frame._FrameAction.SKIP
        for function in functions:
            strategy = eval_frame._FrameExecStrategy(skip, skip)
            eval_frame.set_code_exec_strategy(function.__code__, strategy)
    except AttributeError:  # an older torch
        return False
    return True


def active_ddp_module() -> Any:
    """The ``DistributedDataParallel`` whose forward is running; ``None`` outside of one."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def fsdp_parameters(module: nn.Module) -> list[Any]:
    """What FSDP2 knows of the parameters that it gathers for one module.

    Args:
        module: any.

    Returns:
        Torch's own records of them; none for a module that FSDP2 has not been applied to.
    """
    if not hasattr(type(module), "_get_fsdp_state"):  # of an instance that lacks it this takes far longer
        return []
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    if groups == [None] and not hasattr(state, "_fsdp_param_group"):
        refuse("torch.distributed.fsdp.FSDPState._fsdp_param_group", _FSDP)
    return [parameter for group in groups if group is not None for parameter in group.fsdp_params]


def gradients_of_fsdp_parameter(parameter: Any) -> Iterator[Tensor]:
    """Gradients of a parameter of :func:`fsdp_parameters` that have not been reduced yet.

    Args:
        parameter: one of them.

    Yields:
        Tensors of the parameter's whole shape.
    """
    accumulated = getattr(parameter, "unsharded_accumulated_grad", None)
    latest = getattr(getattr(parameter, "_unsharded_param", None), "grad", None)
    for gradient in (accumulated, latest):
        if isinstance(gradient, Tensor):
            yield gradient


def is_fake_mode_on() -> bool:
    """Whether operators make tensors without data at present, other than by a mode that does so itself."""
    return _name("get_dispatch_mode")(_name("TorchDispatchModeKey").FAKE) is not None


def world_of_process_groups() -> Any:
    """What torch keeps of the process groups that there are."""
    return _name("distributed_world")


def _name(name: str) -> Any:
    found = globals().get(name)
    if found is None:
        found = globals()[name] = _NAMES[name].look_up()
    return found


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _name(name)
