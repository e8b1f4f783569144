// What calls and their callees ask of torch's profiler for RPC.
#pragma once

#if __has_include(<torch/csrc/distributed/rpc/profiler/remote_profiler_manager.h>)
#include <torch/csrc/distributed/rpc/profiler/remote_profiler_manager.h>
#include <torch/csrc/distributed/rpc/profiler/server_process_global_profiler.h>
#else
#include <memory>
#include <shared_mutex>
#include <string>

#include <torch/csrc/Export.h>
// torch 2.6 exports these, but leaves out the headers.
namespace torch::distributed::rpc {
class TORCH_API RemoteProfilerManager {
 public:
  RemoteProfilerManager() = delete; // the members are torch's business
  static RemoteProfilerManager& getInstance();
  void setCurrentKey(std::string key);
  bool isCurrentKeySet() const;
  std::string& getCurrentProfilingKey();
};
namespace profiler::processglobal {
class StateStackEntry;
TORCH_API extern std::shared_ptr<StateStackEntry> currentStateStackEntryPtr;
TORCH_API extern std::shared_timed_mutex currentStateStackEntryMutex;
} // namespace profiler::processglobal
} // namespace torch::distributed::rpc
#endif

namespace torch_rpc_mpi {

// Whether a profiler of the whole process is on. (torch's StateStackEntry::current() also shares its ownership.)
inline bool wholeProcessIsProfiled() {
  namespace process = torch::distributed::rpc::profiler::processglobal;
  const std::shared_lock lock(process::currentStateStackEntryMutex);
  return process::currentStateStackEntryPtr != nullptr;
}

} // namespace torch_rpc_mpi
