// The transfer protocol: frames, credit and bulk streams between this rank and every other. It dispatches to peers.
//
// Note [Frames and bulk]
// ~~~~~~~~~~~~~~~~~~~~~~
// A message is one frame; what does not fit follows on the bulk channel, which is one ordered stream of chunks for each
// pair of ranks. Both sides cut every part into chunks of the same size and post them in the order of their frames, so
// that chunks need no names. The receiver posts a few chunks at a time: a large transfer then yields to small frames
// after each chunk, although MPI may copy a whole chunk inside one call. Parts are sent from the tensors' own storage
// and received into the storage that the callee's tensor will own.
// Small frames that had to wait travel together, as one of kind kBatch, and are as if they had come one by one.
// A frame or a chunk that is not what was announced leaves no way to tell what the next chunk belongs to: it fails the
// peer, see Note [States of a peer] in peer.h.
// How much may be under way: Note [Credit] in credit.h, and to a peer of this host Note [Untaken messages] in window.h.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "peer/due_peers.h"
#include "peer/peer.h"

namespace torch_rpc_mpi {

// Everything is guarded by the progress token but: counters_ (atomics, read by anyone), due_, and what Peer and Credit
// say of themselves.
class Exchange : private PeerFailureListener {
 public:
  using Time = Peer::Time;

  Exchange(Transport& transport, ExchangeListener& listener, const ExchangeOptions& options);
  ~Exchange() override;

  FramePool& frames() {
    return *frames_;
  }
  const ExchangeCounters& counters() const {
    return counters_;
  }
  // Posts the first receives.
  void start(ProgressToken& token);
  // Sends, queues or refuses; refused ones are among the done messages.
  void post(ProgressToken& token, OutboundPtr message);
  // Nobody waits any more for the answer to this call. Its request, if it still has to be sent; else the peer is told.
  OutboundPtr forget(ProgressToken& token, int rank, uint64_t callId);
  // A message that is late, see OutboundMessage.
  void drop(ProgressToken& token, OutboundPtr message);
  // Whether something of that rank has arrived in part.
  bool receives(ProgressToken& token, int rank) const;
  // One bounded turn; returns whether anything moved. Throws when the transport is broken.
  bool poll(ProgressToken& token);
  // What depends on time: tells peers of credit that no frame has told them of for a while, lets peers go, and gives
  // back the memory of what they were sent.
  void look(ProgressToken& token, Time now);
  // See Note [States of a peer]. The cause is put into words by the listener.
  void leaves(ProgressToken& token, int rank, const std::string& cause, Time now);
  void fail(ProgressToken& token, int rank, const std::string& cause);
  // For all of them.
  void close(ProgressToken& token, bool agreed) noexcept;

  // Those since the last call: to be destroyed, or told that they failed, outside the token.
  DoneMessages takeDone(ProgressToken& token);

  // Any thread: a request of `source` left the queue to be run.
  void released(int source, uint64_t chargedBytes);
  // Any thread: a message of `source` that had arrived makes no sense. The next turn fails the peer.
  void refuse(int source, const std::string& why);
  // Any thread, a hint: a request of so many bytes would leave at once.
  bool wouldSendAtOnce(int rank, uint64_t chargedBytes) const;
  Peer::State stateOf(int rank) const { // any thread
    return peers_[rank]->state();
  }
  // Something waits for a device, and so for later turns, which nobody asks for.
  bool awaitsDevice(ProgressToken& /*token*/) const {
    return !atDevice_.empty();
  }
  bool hasDue() const { // any thread: somebody is to be told of credit, or to fail
    return due_.any();
  }
  // Whether a request waits here to be sent; whether not all of one that has been is there.
  bool holdsRequest(ProgressToken& /*token*/, int rank, uint64_t callId) const {
    return peers_[rank]->outgoing.holdsRequest(callId);
  }
  // Whether one waits here until its tensors' device has done what comes before.
  bool stagesRequest(ProgressToken& /*token*/, int rank, uint64_t callId) const {
    return peers_[rank]->outgoing.stagesRequest(callId);
  }
  bool lacksPartOf(ProgressToken& /*token*/, int source, FrameKind kind, uint64_t callId) const {
    return peers_[source]->incoming.lacksPartOf(kind, callId);
  }
  // Nothing under way in either direction, as far as this side knows.
  bool quiet(ProgressToken& token) const;

 private:
  struct FrameReceive;

  void onPeerFailed(ProgressToken& token, int rank, const std::string& reason) noexcept override;
  void reportCredit(ProgressToken& token, const std::vector<int>& ranks);
  void giveBackMemory();
  bool sendBlocked(ProgressToken& token); // whether there was something that could be sent
  bool moveAtDevice(ProgressToken& token);
  void onFrame(ProgressToken& token, FrameBuffer frame, const OperationStatus& status);
  void onFrameOf(ProgressToken& token, int source, FrameBuffer frame, size_t bytes);
  void takeApart(ProgressToken& token, int source, const FrameBuffer& batch, const FrameHeader& header);
  void deliver(ProgressToken& token, int source, FrameBuffer frame, const FrameHeader& header);
  void postFrameReceive(ProgressToken& token, FrameReceive* slot);

  Transport& transport_;
  ExchangeListener& listener_;
  const ExchangeOptions options_;
  const std::shared_ptr<FramePool> frames_;
  ExchangeCounters counters_;
  DoneMessages done_;
  WindowBudget windows_;
  std::vector<OutboundMessage*> kept_;
  std::vector<int> blocked_, wereBlocked_, atDevice_, wereAtDevice_; // peers, see PeerContext
  PeerContext context_;
  std::vector<std::unique_ptr<Peer>> peers_; // this rank's own is never used
  std::vector<std::unique_ptr<FrameReceive>> receives_;
  Time nextStaleLook_{};
  std::optional<Time> errorsOfNobodySince_; // of MPI, one after the other, that name no peer
  std::string fatal_;                       // what broke the transport; thrown by the next poll()
  bool closed_ = false;
  DuePeers due_;
};

} // namespace torch_rpc_mpi
