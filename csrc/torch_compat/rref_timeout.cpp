#include "torch_compat/rref_timeout.h"

#include "torch_compat/private_member.h"

namespace torch_rpc_mpi::torch_compat {

namespace rpc = torch::distributed::rpc;

struct TimedOut {
  using type = std::atomic<bool> rpc::RRef::*;
  friend type memberOf(TimedOut);
};
template struct GrantMember<TimedOut, &rpc::RRef::timedOut_>;

void markTimedOut(rpc::RRef& rref) {
  rref.*memberOf(TimedOut()) = true;
}

void tameTimeoutHandler() {
  static const auto* const kNobodys = [] {
    const auto* rref = new auto(
        c10::make_intrusive<rpc::OwnerRRef>(0, rpc::RRefId(0, 0), c10::NoneType::get(), std::vector<c10::Device>()));
    (*rref)->handleError(rpc::RPCErrorType::TIMEOUT, *c10::make_intrusive<rpc::JitFuture>(c10::NoneType::get()));
    return rref;
  }();
  (void)kNobodys;
}

} // namespace torch_rpc_mpi::torch_compat
