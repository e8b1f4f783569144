#include "agent/device_lending.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include <c10/util/Logging.h>

#include "peer/outbound_control.h"

namespace torch_rpc_mpi {

namespace {

// Returns wait so long for others to go with them.
constexpr auto kReturnsWait = std::chrono::microseconds(300);

template <typename T>
std::string bytesOf(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

template <typename T>
T read(ConstSpan body) {
  if (body.bytes != sizeof(T)) {
    throw std::runtime_error("it sent a frame of another size than its kind has");
  }
  T value;
  std::memcpy(&value, body.data, sizeof(T));
  return value;
}

} // namespace

bool DeviceLending::pending() const {
  return devices_ != nullptr && devices_->lender() != nullptr &&
      (devices_->lender()->hasOffers() || devices_->borrower()->hasReturns());
}

bool DeviceLending::send(ProgressToken& token) {
  if (!pending()) {
    return false;
  }
  bool any = false;
  const auto post = [&](int peer, FrameKind kind, std::string body) {
    exchange_.post(token, std::make_unique<OutboundControl>(peer, kind, std::move(body)));
    any = true;
  };
  for (const auto& [peer, offer] : devices_->lender()->takeOffers()) {
    post(peer, FrameKind::kOffer, bytesOf(offer));
  }
  if (!devices_->borrower()->hasReturns()) {
    return any;
  }
  const auto now = Clock::now();
  returnsSince_ = std::min(returnsSince_, now);
  const bool all = now - returnsSince_ >= kReturnsWait;
  for (const auto& [lender, verdict] : devices_->borrower()->takeRefusals()) {
    post(lender, FrameKind::kVerdict, bytesOf(verdict));
  }
  for (const auto& [lender, returns] : devices_->borrower()->takeReturns(all)) {
    post(
        lender, FrameKind::kReturn,
        {reinterpret_cast<const char*>(returns.data()), returns.size() * sizeof(LendingReturn)});
    returnsSince_ = Clock::time_point::max();
  }
  return any;
}

void DeviceLending::onFrame(ProgressToken& token, const InboundMessage& message) {
  if (devices_ == nullptr || devices_->lender() == nullptr) {
    throw std::runtime_error("it sent a frame about device memory to a worker that shares none");
  }
  const ConstSpan body = message.body();
  switch (message.header.kind) {
    case FrameKind::kOffer: {
      const auto offer = read<LendingOffer>(body);
      if (!devices_->has({devices_->type(), static_cast<c10::DeviceIndex>(offer.there)})) {
        throw std::runtime_error("it offers memory to a device that this worker does not use");
      }
      const LendingVerdict verdict = devices_->borrower()->onOffer(message.source, offer);
      exchange_.post(token, std::make_unique<OutboundControl>(message.source, FrameKind::kVerdict, bytesOf(verdict)));
      break;
    }
    case FrameKind::kVerdict: {
      const std::string why = devices_->lender()->onVerdict(message.source, read<LendingVerdict>(body));
      if (!why.empty()) {
        LOG(WARNING) << "RPC from " << members_.describe(members_.rank()) << " to " << members_.describe(message.source)
                     << " sends device tensors "
                     << (devices_->mpiTakesMemory() ? "by MPI" : "through pinned memory of the host")
                     << ", because their devices' memory cannot be shared: " << why;
      }
      break;
    }
    default: {
      if (body.bytes % sizeof(LendingReturn) != 0) {
        throw std::runtime_error("it gives back a part of a ticket");
      }
      for (size_t at = 0; at < body.bytes; at += sizeof(LendingReturn)) {
        LendingReturn back;
        std::memcpy(&back, body.data + at, sizeof(back));
        devices_->lender()->takeBack(message.source, back);
      }
    }
  }
}

} // namespace torch_rpc_mpi
