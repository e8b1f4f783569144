// Private members of torch's classes, for those that have no function for what we need of them.
#pragma once

namespace torch_rpc_mpi::torch_compat {

// To name a private member is allowed in an explicit instantiation, which hands it on:
//
//     struct Member { using type = int Class::*; friend type memberOf(Member); };
//     template struct GrantMember<Member, &Class::member_>;
//
// and then object.*memberOf(Member()). With a torch whose member has another name or type this does not compile.
template <typename Member, typename Member::type pointer>
struct GrantMember {
  friend typename Member::type memberOf(Member) {
    return pointer;
  }
};

} // namespace torch_rpc_mpi::torch_compat
