"""Which of torch's tests do not apply, and why; which fastref does not pass yet; which run every time.

Line numbers are those of ``torch/testing/_internal/distributed`` in torch 2.13.0: of ``nn/api/remote_module_test.py``
for tests of remote modules, of ``rpc/dist_autograd_test.py`` for classes with ``DistAutograd`` in their names, of
``rpc/rpc_test.py`` for the others.
"""

from __future__ import annotations

__all__ = ["MISSING", "NOT_APPLICABLE", "QUICK"]

# A reason is a defect of torch that the test asserts, or an object of torch's C++ agent that it looks into.
NOT_APPLICABLE: dict[str, str] = {
    "DistAutogradTest.test_backward_unused_send_function": (
        "line 1652 wants a backward pass to wait for ever for the gradient of a tensor that was sent and not used"
    ),
    "DistAutogradTest.test_no_grad_copy": (
        "line 2337 wants both of two leaf tensors that get one gradient to have a copy; here the second keeps it"
    ),
    "DistAutogradTest.test_trainer_ps_torchscript_functions": (
        "line 172: a script function that takes a reference, which is an object of torch's C++ agent there"
    ),
    **dict.fromkeys(
        (
            "RemoteModuleTest.test_forward_async",
            "RemoteModuleTest.test_forward_async_script",
            "RemoteModuleTest.test_forward_sync",
            "RemoteModuleTest.test_forward_sync_script",
            "RemoteModuleTest.test_remote_module_py_pickle_not_supported_script",
            "ThreeWorkersRemoteModuleTest.test_send_remote_module_over_the_wire_script_not_supported",
        ),
        "line 122 makes a remote module for TorchScript, whose calls torch compiles into calls of its own C++ agent",
    ),
    "RpcTest.test_custom_exception_throw_during_reconstruction": (
        "line 3553 wants a RuntimeError in the place of an exception whose class cannot be made from one string; here"
        " the exception itself comes through"
    ),
    "RpcTest.test_profiler_with_async_rpc_udf": (
        "line 2168 wants torch.profiler to show no calls, which only the legacy one does in torch; here both do"
    ),
    "RpcTest.test_profiler_with_async_rpc_udf_single_threaded": "line 2168: see test_profiler_with_async_rpc_udf",
    "RpcTest.test_py_raise_in_user_func": "line 2648 wants what a function raised on the callee's standard error too",
    "RpcTest.test_py_raise_in_user_func_escaped_str": (
        "line 2660 wants backslashes in messages interpreted, which spoils paths and all that is beyond ASCII"
    ),
    "RpcTest.test_rref_proxy_non_exist": (
        "line 1218 wants an error from a call that returns a reference: torch asks for the value's type before each"
        " first call, and so waits for the owner; here the error comes from using the reference"
    ),
    "TensorPipeAgentRpcTest.test_rref_proxy_timeout": (
        "line 4707 wants a timeout from a call that returns a reference: see test_rref_proxy_non_exist"
    ),
    "RpcTest.test_wait_all_exit_early_builtin": "line 3605: see test_wait_all_exit_early_python",
    "RpcTest.test_wait_all_exit_early_python": (
        "line 3584: torch.futures.wait_all ends early only for futures that C++ code has marked as failed; none made in"
        " Python can be"
    ),
    "RpcTest.test_wait_all_exit_early_script_function": "line 3626: see test_wait_all_exit_early_python",
}

# Each is run, and has to fail: what passes is to be taken off this list.
MISSING: dict[str, str] = {}

# One of each kind: about half a minute.
QUICK: list[str] = [
    "DistAutogradTest.test_backward_rref_nested",
    "DistAutogradTest.test_graph_for_py_nested_call_itself",
    "DistOptimizerTest.test_dist_optim_exception",
    "FaultyAgentDistAutogradTest.test_context_cleanup_tensor_with_grad",
    "RemoteModuleTest.test_remote_parameters",
    "TensorPipeAgentDistAutogradTest.test_embedding_bag_with_no_grad_tensors",
    "FaultyAgentRpcTest.test_builtin_remote_message_dropped_timeout",
    "FaultyAgentRpcTest.test_rref_to_here_timeout",
    "RpcTest.test_all_gather",
    "RpcTest.test_async_class_rref_proxy_async",
    "RpcTest.test_async_function_nested",
    "RpcTest.test_builtin_remote_self",
    "RpcTest.test_duplicate_name",
    "RpcTest.test_function_not_on_callee",
    "RpcTest.test_graceful_shutdown_with_uneven_workload",
    "RpcTest.test_invalid_names",
    "RpcTest.test_multi_rpc",
    "RpcTest.test_nested_rref",
    "RpcTest.test_non_cont_tensors",
    "RpcTest.test_profiler_remote_events_profiled",
    "RpcTest.test_py_multi_async_call",
    "RpcTest.test_py_rref_args",
    "RpcTest.test_register_rpc_backend_and_set_and_start_rpc_backend",
    "RpcTest.test_rpc_return_rref",
    "RpcTest.test_rref_context_debug_info",
    "RpcTest.test_rref_leak",
    "RpcTest.test_rref_str",
    "RpcTest.test_shutdown_errors",
    "RpcTest.test_wait_all",
    "TensorPipeAgentRpcTest.test_dynamic_rpc_existing_rank_can_communicate_with_new_rank",
    "TensorPipeAgentRpcTest.test_infer_backend_from_options",
    "TensorPipeAgentRpcTest.test_op_with_invalid_args",
]
