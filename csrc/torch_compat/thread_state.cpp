#include "torch_compat/thread_state.h"

#include <ATen/autocast_mode.h>

#include "torch_compat/new_thread.h"

namespace torch_rpc_mpi {

using Objects = at::impl::ThreadLocalPythonObjects;

ThreadState::ThreadState() {
  if (!asInNewThread()) {
    all_ = std::make_shared<const at::ThreadLocalState>();
  } else if (!holdsNoPythonObjects()) {
    objects_ = std::make_shared<const Objects>(Objects::get_state());
  }
}

void ThreadState::set() const {
  if (all_ != nullptr) {
    at::ThreadLocalState::setThreadLocalState(*all_);
    return;
  }
  setNew();
  if (objects_ != nullptr) {
    Objects::set_state(*objects_);
  }
}

void ThreadState::setNew() {
  if (!asInNewThread()) {
    at::ThreadLocalState::setThreadLocalState(stateOfNewThread());
  } else if (!holdsNoPythonObjects()) {
    Objects::set_state({});
  }
}

KeptThreadState::KeptThreadState()
    : wasKnown_(std::exchange(knownAsNew(), false)),
      autocastCaches_(at::autocast::is_autocast_cache_enabled()) {
  if (!wasKnown_ || !recordsAsInNewThread()) {
    state_.emplace();
  }
}

KeptThreadState::~KeptThreadState() {
  if (state_.has_value()) {
    state_->set();
  } else {
    ThreadState::setNew();
  }
  at::autocast::set_autocast_cache_enabled(autocastCaches_);
  knownAsNew() = wasKnown_;
}

NewThreadState::NewThreadState(bool alsoRecorded) {
  if (knownAsNew()) {
    return;
  }
  if (!asInNewThread() || !holdsNoPythonObjects()) {
    const bool records = c10::AutogradState::get_tls_state().get_grad_mode();
    const auto profiler = c10::ThreadLocalDebugInfo::current();
    before_.emplace();
    ThreadState::setNew();
    if (alsoRecorded) {
      c10::AutogradState::get_tls_state().set_grad_mode(records);
      c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(profiler);
      return;
    }
  }
  knownAsNew() = true;
}

} // namespace torch_rpc_mpi
