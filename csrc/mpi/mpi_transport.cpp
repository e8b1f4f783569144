#include "mpi/mpi_transport.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "host/other_process.h"

namespace torch_rpc_mpi {

namespace {

// Frames taken in one turn: enough to amortise the turn, few enough that sends and deadlines are not starved.
constexpr size_t kFrameBatch = 16;

// For all receives together; those that can be cancelled are at once.
constexpr auto kCancelLimit = std::chrono::milliseconds(200);

// A process's memory is gone, which MPI notices, a little before the system says that it has ended.
constexpr auto kEndingLimit = std::chrono::milliseconds(50);

// For room in MPI, or for a connection.
constexpr auto kBetweenAttempts = std::chrono::milliseconds(1);

} // namespace

MpiTransport::MpiTransport(
    std::shared_ptr<Communicator> communicator,
    std::shared_ptr<Neighbours> neighbours,
    bool anySource)
    : communicator_(std::move(communicator)),
      neighbours_(std::move(neighbours)),
      mpi_(*communicator_->mpi()),
      anySource_(anySource),
      frames_(anySource ? 1 : communicator_->size()) {}

// An error of MPI's is often the first that is heard of a process that has ended: that is then what helps.
std::string MpiTransport::failureText(int peer, const std::string& what) const {
  return peer != kAnySource && neighbours_->hasEnded(peer, kEndingLimit)
      ? std::string(kEndedWithoutLeaving) + ": " + what
      : what;
}

// peer: where the status does not tell it, or kAnySource.
OperationStatus MpiTransport::translate(const trm_status& status, int peer) const {
  OperationStatus result;
  result.source = status.source;
  result.bytes = status.bytes;
  if (status.error != 0) {
    result.error = failureText(peer == kAnySource ? status.source : peer, mpi_.errorText(status.error));
  } else if (status.cancelled != 0) {
    result.error = "cancelled";
  }
  return result;
}

void MpiTransport::track(trm_handle request, const Posted& posted) {
  requests_.push_back(request);
  operations_.push_back(posted);
}

// To ranks of other hosts, MPI may have no room or no connection for a while: it is never waited for, because it may be
// that the peer is dead (see shim/retries.h). What comes after a message that was not taken waits behind it.
void MpiTransport::send(
    ProgressToken& token,
    int peer,
    Channel channel,
    const void* data,
    size_t bytes,
    Operation* op) {
  const Deferred send{channel, data, bytes, op};
  if (deferred_.count(peer) > 0) {
    deferred_[peer].sends.push_back(send);
    return;
  }
  if (!trySend(token, peer, send)) {
    deferred_[peer] = {{send}, Clock::now() + kBetweenAttempts};
  }
}

// Where an attempt takes long, which it does if there is no connection, most of the time is the other peers'.
Clock::time_point MpiTransport::pauseAfter(Clock::time_point begin) {
  const auto now = Clock::now();
  return now + std::max<Clock::duration>(kBetweenAttempts, 10 * (now - begin));
}

size_t MpiTransport::sendDeferred(ProgressToken& token) {
  size_t sent = 0;
  const auto now = deferred_.empty() ? Clock::time_point() : Clock::now();
  for (auto next = deferred_.begin(); next != deferred_.end();) {
    const int peer = next->first;
    bool taken = now >= next->second.nextAttempt;
    while (taken) {
      const auto begin = Clock::now();
      taken = trySend(token, peer, next->second.sends.front());
      next = deferred_.find(peer); // what a completion does may end a peer
      if (next == deferred_.end()) {
        break;
      }
      if (!taken) {
        next->second.nextAttempt = pauseAfter(begin);
        break;
      }
      ++sent;
      next->second.sends.pop_front();
      taken = !next->second.sends.empty();
    }
    if (next != deferred_.end() && next->second.sends.empty()) {
      deferred_.erase(next);
    }
    next = deferred_.upper_bound(peer);
  }
  return sent;
}

bool MpiTransport::trySend(ProgressToken& token, int peer, const Deferred& send) {
  trm_handle request = mpi_->request_null;
  const auto tag = static_cast<int>(send.channel);
  int posted = 1;
  const int code = neighbours_->reaches(peer)
      ? mpi_->isend(send.data, send.bytes, peer, tag, communicator_->handle(), &request)
      : mpi_->try_isend(send.data, send.bytes, peer, tag, communicator_->handle(), &request, &posted);
  if (posted == 0) {
    return false;
  }
  if (code != 0) {
    OperationStatus status;
    status.error =
        failureText(peer, "MPI_Isend of " + std::to_string(send.bytes) + " bytes failed: " + mpi_.errorText(code));
    send.op->complete(token, status);
    return true;
  }
  neighbours_->ring(peer);
  // Eager sends are complete when they return: one test now spares them the array.
  int done = 0;
  trm_status status{};
  const int tested = mpi_->test(&request, &done, &status);
  if (tested != 0) { // the request is complete with it
    OperationStatus failed;
    failed.error = failureText(
        peer, "MPI_Test of a message of " + std::to_string(send.bytes) + " bytes failed: " + mpi_.errorText(tested));
    send.op->complete(token, failed);
  } else if (done != 0) {
    send.op->complete(token, translate(status, peer));
  } else {
    track(request, {send.op, peer, /*receive=*/false});
  }
  return true;
}

std::vector<int> MpiTransport::frameSources() const {
  if (anySource_) {
    return {kAnySource};
  }
  std::vector<int> peers;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank()) {
      peers.push_back(peer);
    }
  }
  return peers;
}

void MpiTransport::receiveFrame(ProgressToken&, int source, void* data, size_t capacity, Operation* op) {
  trm_handle request = mpi_->request_null;
  mpi_.check(
      mpi_->irecv(data, capacity, source, static_cast<int>(Channel::kFrame), communicator_->handle(), &request),
      "MPI_Irecv");
  frames_[anySource_ ? 0 : source].push_back({request, op});
}

void MpiTransport::receiveBulk(ProgressToken& token, int peer, void* data, size_t bytes, Operation* op) {
  trm_handle request = mpi_->request_null;
  const int code = mpi_->irecv(data, bytes, peer, static_cast<int>(Channel::kBulk), communicator_->handle(), &request);
  if (code != 0) {
    OperationStatus status;
    status.source = peer;
    status.error =
        failureText(peer, "MPI_Irecv of " + std::to_string(bytes) + " bytes failed: " + mpi_.errorText(code));
    op->complete(token, status);
    return;
  }
  track(request, {op, peer, /*receive=*/true});
}

size_t MpiTransport::poll(ProgressToken& token) {
  return sendDeferred(token) + pollFrames(token) + pollOthers(token);
}

size_t MpiTransport::pollFrames(ProgressToken& token) {
  if (!anySource_) {
    return pollFramesOfEach(token);
  }
  std::deque<FrameReceive>& frames = frames_.front();
  size_t completed = 0;
  while (completed < kFrameBatch && !frames.empty()) {
    int done = 0;
    trm_status status{};
    const int code = mpi_->test(&frames.front().request, &done, &status);
    if (code == 0 && done == 0) {
      break;
    }
    Operation* op = frames.front().op;
    frames.pop_front();
    if (code != 0) {
      status.error = code;
    }
    took(status.source, Channel::kFrame);
    op->complete(token, translate(status, kAnySource));
    ++completed;
  }
  return completed;
}

// At most one of each source. All are tested in one call, because each has MPI look at everything.
size_t MpiTransport::pollFramesOfEach(ProgressToken& token) {
  heads_.clear();
  for (const auto& frames : frames_) {
    heads_.push_back(frames.empty() ? mpi_->request_null : frames.front().request);
  }
  const int completed = testSome(heads_);
  std::vector<std::pair<Operation*, OperationStatus>> finished; // their callbacks may use the arrays
  for (int i = 0; i < completed; ++i) {
    std::deque<FrameReceive>& frames = frames_[indices_[i]];
    finished.emplace_back(frames.front().op, translate(statuses_[i], indices_[i]));
    frames.pop_front();
    took(indices_[i], Channel::kFrame);
  }
  for (auto& [op, status] : finished) {
    op->complete(token, status);
  }
  return finished.size();
}

int MpiTransport::testSome(std::vector<trm_handle>& requests) {
  indices_.resize(requests.size());
  statuses_.resize(requests.size());
  int completed = 0;
  mpi_.check(
      mpi_->testsome(static_cast<int>(requests.size()), requests.data(), &completed, indices_.data(), statuses_.data()),
      "MPI_Testsome");
  return completed;
}

size_t MpiTransport::pollOthers(ProgressToken& token) {
  const size_t count = requests_.size();
  if (count == 0) {
    return 0;
  }
  const int completed = testSome(requests_);
  if (completed <= 0) {
    return 0;
  }
  // The finished ones leave the arrays before their callbacks run, which may append to them.
  std::vector<std::pair<Operation*, OperationStatus>> finished;
  finished.reserve(completed);
  for (int i = 0; i < completed; ++i) {
    const Posted& posted = operations_[indices_[i]];
    finished.emplace_back(posted.op, translate(statuses_[i], posted.peer));
    if (posted.receive) {
      took(posted.peer, Channel::kBulk);
    }
    operations_[indices_[i]].op = nullptr;
  }
  dropFinished();
  for (auto& [op, status] : finished) {
    op->complete(token, status);
  }
  return finished.size();
}

void MpiTransport::dropFinished() {
  size_t kept = 0;
  for (size_t i = 0; i < operations_.size(); ++i) {
    if (operations_[i].op != nullptr) {
      requests_[kept] = requests_[i];
      operations_[kept++] = operations_[i];
    }
  }
  requests_.resize(kept);
  operations_.resize(kept);
}

void MpiTransport::park(ProgressToken&, int peer) {
  for (Posted& posted : operations_) {
    if (posted.peer == peer) {
      posted.op = nullptr;
    }
  }
  dropFinished();
  deferred_.erase(peer);
  if (!anySource_) {
    parkedFrames_ += frames_[peer].size();
    frames_[peer].clear();
  }
}

// One that a stopped process has begun to fill is complete only when that goes on: nobody waits for it.
size_t MpiTransport::cancelFrames() noexcept {
  size_t left = 0;
  const auto limit = Clock::now() + kCancelLimit;
  for (auto& frames : frames_) {
    for (FrameReceive& frame : frames) {
      (void)mpi_->cancel(&frame.request);
    }
  }
  for (auto& frames : frames_) {
    for (FrameReceive& frame : frames) {
      int done = 0;
      trm_status status{};
      while (mpi_->test(&frame.request, &done, &status) == 0 && done == 0 && Clock::now() < limit) {
        std::this_thread::yield();
      }
      left += done == 0 ? 1 : 0;
    }
    frames.clear();
  }
  return left;
}

size_t MpiTransport::close(ProgressToken&, bool agreed) noexcept {
  if (closed_) {
    return 0;
  }
  closed_ = true;
  size_t left = parkedFrames_;
  try {
    if (mpi_.finalized()) {
      return left;
    }
    left += cancelFrames();
    // Unfinished ones belong to a peer that left: MPI may still touch their memory, which is why the caller never
    // frees it. They are not cancelled (a send cannot be) and not waited for (the peer will not answer).
    requests_.clear();
    operations_.clear();
    deferred_.clear();
    if (agreed) {
      communicator_->free();
    }
  } catch (const MpiError&) {
    // Closing is the last thing that happens here; there is nobody left to tell.
  }
  return left;
}

} // namespace torch_rpc_mpi
