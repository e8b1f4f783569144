#include "torch_compat/thread_state.h"

#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/autocast_mode.h>

#include "agent/engine_work.h"
#include "check.h"
#include "torch_compat/new_thread.h"

using namespace torch_rpc_mpi;

namespace {

c10::AutogradState& modes() {
  return c10::AutogradState::get_tls_state();
}

struct Change {
  const char* what;
  void (*make)();
};

// One for each part of the state that can be set without a Python.
const Change kChanges[] = {
    {"grad mode", [] { modes().set_grad_mode(false); }},
    {"inference mode", [] { modes().set_inference_mode(true); }},
    {"forward grad mode", [] { modes().set_fw_grad_mode(false); }},
    {"multithreading", [] { modes().set_multithreading_enabled(false); }},
    {"view replay", [] { modes().set_view_replay_enabled(true); }},
    {"included keys",
     [] { c10::impl::tls_set_dispatch_key_included(c10::DispatchKey::TESTING_ONLY_GenericMode, true); }},
    {"excluded keys",
     [] { c10::impl::tls_set_dispatch_key_excluded(c10::DispatchKey::TESTING_ONLY_GenericMode, true); }},
    {"autocast", [] { at::autocast::set_autocast_enabled(at::kCPU, true); }},
    {"autocast type", [] { at::autocast::set_autocast_dtype(at::kCPU, at::kHalf); }},
    {"torch functions",
     [] { at::impl::PythonTorchFunctionTLS::set_disabled_state(at::impl::TorchFunctionDisabledState::ALL_DISABLED); }},
    {"saved tensors", [] { at::SavedTensorDefaultHooks::disable("not now"); }},
    {"reapplied views", [] { at::functionalization::impl::setFunctionalizationReapplyViewsTLS(true); }},
    {"recording", [] { at::set_record_function_tls_({{}, false}); }},
    {"debug information",
     [] { c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::TEST_INFO, std::make_shared<c10::DebugInfoBase>()); }},
    {"Python objects", [] { at::impl::ThreadLocalPythonObjects::set("name", nullptr); }},
};

bool isNew() {
  return asInNewThread() && holdsNoPythonObjects();
}

void inNewThread(const std::function<void()>& body) {
  std::exception_ptr error;
  std::thread([&] {
    try {
      body();
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) {
    std::rethrow_exception(error);
  }
}

// In a thread of its own for each change.
void forEachChange(const std::function<void(const Change&)>& body) {
  for (const Change& change : kChanges) {
    inNewThread([&] {
      try {
        body(change);
      } catch (const check::Failure& failure) {
        throw check::Failure(std::string(failure.what()) + " (" + change.what + ")");
      }
    });
  }
}

} // namespace

TEST(thread_state_every_part_of_it_is_looked_at) {
  inNewThread([] { CHECK_THAT(isNew()); });
  forEachChange([](const Change& change) {
    change.make();
    CHECK_THAT(!isNew());
    ThreadState::setNew();
    CHECK_THAT(isNew());
  });
}

TEST(thread_state_of_one_thread_is_given_to_another_for_a_while) {
  forEachChange([](const Change& change) {
    const ThreadState before;
    CHECK_THAT(before.isNew());
    change.make();
    const ThreadState changed;
    CHECK_THAT(!changed.isNew());
    inNewThread([&] {
      {
        const ThreadState::Guard guard(changed);
        CHECK_THAT(!isNew());
        {
          const ThreadState::Guard inner(before);
          CHECK_THAT(isNew());
        }
        CHECK_THAT(!isNew());
      }
      CHECK_THAT(isNew());
    });
  });
}

TEST(thread_state_of_engine_work_is_a_new_threads_and_the_users_comes_back) {
  forEachChange([](const Change& change) {
    change.make();
    {
      const EngineWork work;
      CHECK_THAT(isNew() && knownAsNew() && EngineWork::underWay());
      {
        const KeptThreadState users;
        CHECK_THAT(!knownAsNew());
        change.make();
      }
      CHECK_THAT(isNew() && knownAsNew());
    }
    CHECK_THAT(!isNew() && !knownAsNew() && !EngineWork::underWay());
  });
}

TEST(thread_state_keeps_what_torch_passes_along_with_a_call) {
  inNewThread([] {
    const auto profiler = std::make_shared<c10::DebugInfoBase>();
    c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, profiler);
    modes().set_grad_mode(false);
    modes().set_inference_mode(true);
    {
      const NewThreadState state(/*alsoRecorded=*/true);
      CHECK_THAT(!modes().get_grad_mode() && !modes().get_inference_mode());
      CHECK_THAT(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE) == profiler.get());
    }
    CHECK_THAT(modes().get_inference_mode());
  });
}

TEST(thread_state_of_a_profiler_outlives_what_runs_under_it) {
  inNewThread([] {
    const EngineWork work;
    const auto profiler = std::make_shared<c10::DebugInfoBase>();
    c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, profiler);
    {
      const KeptThreadState users;
    }
    CHECK_THAT(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE) == profiler.get());
    c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE);
  });
}
