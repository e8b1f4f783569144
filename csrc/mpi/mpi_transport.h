// The transport over MPI point-to-point messages.
#pragma once

#include <deque>
#include <map>
#include <vector>

#include "base/clock.h"
#include "host/neighbours.h"
#include "mpi/communicator.h"
#include "transport/transport.h"

namespace torch_rpc_mpi {

// All members are guarded by the progress token; communicator_, neighbours_ and anySource_ are immutable.
class MpiTransport final : public Transport {
 public:
  // neighbours: who has met the communicator's members. anySource: whether this MPI can be trusted with receives from
  // any source.
  MpiTransport(std::shared_ptr<Communicator> communicator, std::shared_ptr<Neighbours> neighbours, bool anySource);

  int rank() const override {
    return communicator_->rank();
  }
  int size() const override {
    return communicator_->size();
  }
  BellWord& bell() override {
    return neighbours_->bell();
  }
  bool allRing() const override {
    return neighbours_->allRing();
  }
  void send(ProgressToken& token, int peer, Channel channel, const void* data, size_t bytes, Operation* op) override;
  std::optional<uint64_t> taken(ProgressToken&, int peer, Channel channel) override {
    return neighbours_->taken(peer, kindOf(channel));
  }
  void awaitTaking(ProgressToken&, int peer, uint64_t messages) override {
    neighbours_->awaitTaking(peer, messages);
  }
  std::vector<int> frameSources() const override;
  void receiveFrame(ProgressToken& token, int source, void* data, size_t capacity, Operation* op) override;
  void receiveBulk(ProgressToken& token, int peer, void* data, size_t bytes, Operation* op) override;
  size_t poll(ProgressToken& token) override;
  std::vector<int> takeEnded(ProgressToken&) override {
    return neighbours_->takeEnded();
  }
  void park(ProgressToken& token, int peer) override;
  size_t close(ProgressToken& token, bool agreed) noexcept override;

 private:
  struct FrameReceive {
    trm_handle request;
    Operation* op;
  };
  // A send that MPI could not take.
  struct Deferred {
    Channel channel;
    const void* data;
    size_t bytes;
    Operation* op;
  };
  struct Posted {
    Operation* op;
    int peer;
    bool receive;
  };

  static size_t kindOf(Channel channel) {
    return channel == Channel::kFrame ? 0 : 1;
  }
  // Tells the sender of what was received.
  void took(int source, Channel channel) {
    if (source >= 0 && source < size()) {
      neighbours_->took(source, kindOf(channel));
    }
  }
  bool trySend(ProgressToken& token, int peer, const Deferred& send); // whether MPI has taken it, or has failed
  size_t sendDeferred(ProgressToken& token);
  static Clock::time_point pauseAfter(Clock::time_point begin);
  size_t pollFrames(ProgressToken& token);
  size_t pollFramesOfEach(ProgressToken& token);
  size_t pollOthers(ProgressToken& token);
  // How many have completed, none or fewer than none if none was active; which and how is in indices_ and statuses_.
  int testSome(std::vector<trm_handle>& requests);
  void track(trm_handle request, const Posted& posted);
  void dropFinished(); // those without an operation
  OperationStatus translate(const trm_status& status, int peer) const;
  std::string failureText(int peer, const std::string& what) const;
  size_t cancelFrames() noexcept; // how many are still posted

  const std::shared_ptr<Communicator> communicator_;
  const std::shared_ptr<Neighbours> neighbours_;
  const MpiLibrary& mpi_;
  const bool anySource_;
  // By source, or one for any. MPI matches receives in the order they were posted: only the head can be the next to
  // complete.
  std::vector<std::deque<FrameReceive>> frames_;
  // Sends that did not complete at once and bulk receives: parallel arrays, as MPI_Testsome wants them.
  std::vector<trm_handle> requests_;
  std::vector<Posted> operations_;
  struct DeferredSends {
    std::deque<Deferred> sends; // in their order
    Clock::time_point nextAttempt;
  };
  std::map<int, DeferredSends> deferred_; // by peer
  std::vector<trm_handle> heads_;         // of frames_, as MPI_Testsome wants them
  std::vector<int> indices_;
  std::vector<trm_status> statuses_;
  size_t parkedFrames_ = 0;
  bool closed_ = false;
};

} // namespace torch_rpc_mpi
