// The last line of a process that SIGTERM ends, as schedulers end what they preempt and what has used up its time.
#pragma once

#include <string_view>

namespace torch_rpc_mpi {

// While it lives, and SIGTERM has its default effect, a line on standard error precedes that. A handler that is
// installed meanwhile takes its place; one that puts back what Python knows, which is the default effect, does so for
// good. A forked child ends without a word, and so does the first process of a container, which the signal does not
// end. The effect is the process's: one object at a time has it, and others do nothing. Made and cancelled by one
// thread at a time.
class TerminationNotice {
 public:
  // line: without its end; of a long one the first 1023 bytes. whenParentEnds: also where the signal comes from the
  // parent, such as a launcher's daemon, which ends all processes of this host with it.
  explicit TerminationNotice(std::string_view line, bool whenParentEnds = true);
  ~TerminationNotice();
  TerminationNotice(const TerminationNotice&) = delete;
  TerminationNotice& operator=(const TerminationNotice&) = delete;
  void cancel() noexcept; // idempotent

 private:
  bool active_ = false;
};

} // namespace torch_rpc_mpi
