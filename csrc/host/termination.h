// The last line of a process that SIGTERM ends: schedulers end so what they preempt, and what has used up its time.
#pragma once

#include <string_view>

namespace torch_rpc_mpi {

// While it lives, and SIGTERM has its default effect, that is preceded by a line on standard error. A handler that is
// installed meanwhile takes its place, and a forked child ends without a word. The signal's effect is the process's:
// one object at a time has it, and others do nothing.
class TerminationNotice {
 public:
  // The line, without its end; of a long one the first 1023 bytes.
  explicit TerminationNotice(std::string_view line);
  ~TerminationNotice();
  TerminationNotice(const TerminationNotice&) = delete;
  TerminationNotice& operator=(const TerminationNotice&) = delete;
  // Idempotent; one thread at a time.
  void cancel() noexcept;

 private:
  bool active_ = false;
};

} // namespace torch_rpc_mpi
