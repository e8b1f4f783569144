// The frames by which neighbours lend each other device memory: see Note [Lent memory] in device/lending.h.
#pragma once

#include <memory>

#include "agent/membership.h"
#include "base/clock.h"
#include "device/devices.h"
#include "peer/exchange.h"

namespace torch_rpc_mpi {

// Of the token's holder: returnsSince_ is guarded by the token, the rest guards itself.
class DeviceLending {
 public:
  DeviceLending(const Membership& members, Exchange& exchange, std::shared_ptr<Devices> devices)
      : members_(members),
        exchange_(exchange),
        devices_(std::move(devices)) {}

  // Whether there is something to be sent, if not at once.
  bool pending() const;
  // Returns whether there was something.
  bool send(ProgressToken& token);
  // An offer, a verdict, or what goes back. Throws std::runtime_error for one that makes no sense.
  void onFrame(ProgressToken& token, const InboundMessage& message);

 private:
  const Membership& members_;
  Exchange& exchange_;
  const std::shared_ptr<Devices> devices_; // null: none are used
  Clock::time_point returnsSince_ = Clock::time_point::max();
};

} // namespace torch_rpc_mpi
