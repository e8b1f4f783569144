#include "torch_compat/new_thread.h"

#include <algorithm>
#include <array>
#include <thread>

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/autocast_mode.h>
#include <torch/version.h>

#include "torch_compat/private_member.h"

#if __has_include(<ATen/DTensorState.h>) // torch 2.10
#include <ATen/DTensorState.h>
#define TORCH_RPC_MPI_HAS_DTENSOR_STATE
#endif
#if __has_include(<ATen/NodeCreationHooks.h>) // torch 2.14
#include <ATen/NodeCreationHooks.h>
#define TORCH_RPC_MPI_HAS_NODE_CREATION_HOOKS
#endif

namespace torch_rpc_mpi {

namespace {

constexpr bool kKnown = TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 6 && TORCH_VERSION_MINOR <= 14;

#if TORCH_VERSION_MINOR >= 11
constexpr auto& kAutocastDevices = at::autocast::_AUTOCAST_SUPPORTED_DEVICES;
#else
// torch 2.6 does not say which devices have a type: all can be asked.
const auto kAutocastDevices = [] {
  std::array<at::DeviceType, at::COMPILE_TIME_MAX_DEVICE_TYPES> devices{};
  for (size_t i = 0; i < devices.size(); ++i) {
    devices[i] = static_cast<at::DeviceType>(i);
  }
  return devices;
}();
#endif

using AutocastTypes = std::array<at::ScalarType, std::tuple_size_v<std::decay_t<decltype(kAutocastDevices)>>>;

AutocastTypes autocastTypes() {
  AutocastTypes types;
  std::transform(kAutocastDevices.begin(), kAutocastDevices.end(), types.begin(), at::autocast::get_autocast_dtype);
  return types;
}

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

// The dispatch modes, the Python dispatcher, functorch's layers and autocast each include or exclude a key while they
// are on.
bool dispatchAsInNewThread() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return keys.included_ == c10::default_included_set && keys.excluded_ == c10::default_excluded_set;
}

// What operators look at only where one of those is on.
bool detailsAsInNewThread() {
#ifdef TORCH_RPC_MPI_HAS_DTENSOR_STATE
  if (at::get_dtensor_allow_implicit_replication()) {
    return false;
  }
#endif
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && c10::impl::PythonDispatcherTLS::get_state() == nullptr &&
      at::functorch::functorchTLSAccessor() == nullptr &&
      !at::functionalization::impl::getFunctionalizationReapplyViewsTLS() && autocastTypes() == newThread().autocast;
}

// Since torch 2.11.
template <typename State>
bool skipsNextTorchFunction() {
  if constexpr (requires { State::peek_skip_next(); }) {
    return State::peek_skip_next();
  } else {
    return false;
  }
}

bool torchFunctionAsInNewThread() {
  using at::impl::PythonTorchFunctionTLS;
  return PythonTorchFunctionTLS::get_disabled_state() == at::impl::TorchFunctionDisabledState::ENABLED &&
      !at::impl::torch_function_mode_enabled() && !skipsNextTorchFunction<PythonTorchFunctionTLS>();
}

// Of later versions of torch than 2.6.
template <typename State>
bool newerModesAsInNewThread(const State& modes) {
  if constexpr (requires { modes.get_grad_layout_enforcement_enabled(); }) {
    if (!modes.get_grad_layout_enforcement_enabled()) {
      return false;
    }
  }
  if constexpr (requires { modes.get_graph_exec_group(); }) {
    if (modes.get_graph_exec_group().has_value()) {
      return false;
    }
  }
  return true;
}

bool autogradAsInNewThread() {
  const auto& modes = c10::AutogradState::get_tls_state();
  const auto& hooks = at::SavedTensorDefaultHooks::get_tls_state();
#ifdef TORCH_RPC_MPI_HAS_NODE_CREATION_HOOKS
  const auto& nodes = at::impl::NodeCreationHooks::get_tls_state();
  if (!nodes.stack.empty() || nodes.is_firing) {
    return false;
  }
#endif
  return modes.get_grad_mode() && !modes.get_inference_mode() && modes.get_fw_grad_mode() &&
      modes.get_multithreading_enabled() && !modes.get_view_replay_enabled() && newerModesAsInNewThread(modes) &&
      hooks.stack.empty() && !hooks.disabled_error_message.has_value() && !hooks.is_tracing;
}

} // namespace

namespace torch_compat {

// The objects that Python code has stashed by name cannot be counted through what torch offers.
struct NamedObjects {
  using type =
      std::unordered_map<std::string, std::shared_ptr<c10::SafePyObject>> at::impl::ThreadLocalPythonObjects::*;
  friend type memberOf(NamedObjects);
};
template struct GrantMember<NamedObjects, &at::impl::ThreadLocalPythonObjects::obj_dict_>;

} // namespace torch_compat

bool recordsAsInNewThread() {
  const auto& records = at::get_record_function_tls_();
  return records.sorted_tls_callbacks_.empty() && records.tls_record_function_enabled_ &&
      c10::ThreadLocalDebugInfo::current() == nullptr;
}

bool holdsNoPythonObjects() {
  return (at::impl::ThreadLocalPythonObjects::get_state().*memberOf(torch_compat::NamedObjects())).empty();
}

bool asInNewThread() {
  return kKnown && dispatchAsInNewThread() && torchFunctionAsInNewThread() && autogradAsInNewThread() &&
      recordsAsInNewThread() && detailsAsInNewThread();
}

const at::ThreadLocalState& stateOfNewThread() {
  return newThread().state;
}

} // namespace torch_rpc_mpi
