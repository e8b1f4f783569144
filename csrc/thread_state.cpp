#include "thread_state.h"

#include <array>
#include <thread>

#include <torch/version.h>

// Which parts at::ThreadLocalState has is known of these series. With others the whole state is kept.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR == 13
#define TORCH_RPC_MPI_KNOWN_THREAD_STATE 1
#include <ATen/DTensorState.h>
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/autocast_mode.h>
#else
#define TORCH_RPC_MPI_KNOWN_THREAD_STATE 0
#endif

namespace torch_rpc_mpi {

namespace {

#if TORCH_RPC_MPI_KNOWN_THREAD_STATE

using AutocastTypes = std::array<at::ScalarType, at::COMPILE_TIME_MAX_DEVICE_TYPES>;

AutocastTypes autocastTypes() {
  AutocastTypes types;
  for (size_t device = 0; device < types.size(); ++device) {
    types[device] = at::autocast::get_autocast_dtype(static_cast<at::DeviceType>(device));
  }
  return types;
}

// What a thread begins with.
struct NewThread {
  at::ThreadLocalState state;
  AutocastTypes autocast = autocastTypes();
};

// Never freed: callbacks may run while the process ends.
const NewThread& newThread() {
  static const NewThread* const made = [] {
    const NewThread* result = nullptr;
    std::thread([&] { result = new NewThread(); }).join();
    return result;
  }();
  return *made;
}

bool dispatchAsInNewThread() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return keys.included_ == c10::default_included_set && keys.excluded_ == c10::default_excluded_set &&
      !c10::impl::TorchDispatchModeTLS::any_modes_set() && c10::impl::PythonDispatcherTLS::get_state() == nullptr &&
      at::functorch::functorchTLSAccessor() == nullptr &&
      !at::functionalization::impl::getFunctionalizationReapplyViewsTLS() &&
      !at::get_dtensor_allow_implicit_replication();
}

bool torchFunctionAsInNewThread() {
  using at::impl::PythonTorchFunctionTLS;
  return PythonTorchFunctionTLS::stack_len() == 0 && !PythonTorchFunctionTLS::peek_skip_next() &&
      PythonTorchFunctionTLS::get_disabled_state() == at::impl::TorchFunctionDisabledState::ENABLED;
}

bool autogradAsInNewThread() {
  const auto& modes = c10::AutogradState::get_tls_state();
  const auto& hooks = at::SavedTensorDefaultHooks::get_tls_state();
  return modes.get_grad_mode() && !modes.get_inference_mode() && modes.get_fw_grad_mode() &&
      modes.get_multithreading_enabled() && !modes.get_view_replay_enabled() &&
      modes.get_grad_layout_enforcement_enabled() && !modes.get_graph_exec_group().has_value() && hooks.stack.empty() &&
      !hooks.disabled_error_message.has_value() && !hooks.is_tracing;
}

bool recordsAsInNewThread() {
  const auto& records = at::get_record_function_tls_();
  return records.sorted_tls_callbacks_.empty() && records.tls_record_function_enabled_ &&
      c10::ThreadLocalDebugInfo::current() == nullptr;
}

bool asInNewThread() {
  return dispatchAsInNewThread() && torchFunctionAsInNewThread() && autogradAsInNewThread() && recordsAsInNewThread() &&
      autocastTypes() == newThread().autocast;
}

const at::ThreadLocalState& stateOfNewThread() {
  return newThread().state;
}

#else

bool asInNewThread() {
  return false;
}

const at::ThreadLocalState& stateOfNewThread() {
  TORCH_INTERNAL_ASSERT(false, "not told apart with this torch");
}

#endif

} // namespace

ThreadState::ThreadState() : objects_(at::impl::ThreadLocalPythonObjects::get_state()) {
  if (!asInNewThread()) {
    all_ = std::make_shared<const at::ThreadLocalState>();
  }
}

ThreadState::Guard::Guard(const ThreadState& state) {
  if (state.all_ != nullptr) {
    all_.emplace(*state.all_);
    return;
  }
  if (!asInNewThread()) {
    all_.emplace(stateOfNewThread());
  } else {
    before_ = at::impl::ThreadLocalPythonObjects::get_state();
  }
  at::impl::ThreadLocalPythonObjects::set_state(state.objects_);
}

ThreadState::Guard::~Guard() {
  if (!all_.has_value()) {
    at::impl::ThreadLocalPythonObjects::set_state(std::move(before_));
  }
}

} // namespace torch_rpc_mpi
