#include "mpi/communicator.h"

#include <cstdint>
#include <map>
#include <sstream>
#include <thread>

#include "base/deadline.h"

namespace torch_rpc_mpi {

namespace {

// Polls `request` until it completes. When the time is over (then it returns false) or a signal throws, the operation
// is still under way and its buffers must stay.
bool completeBy(
    const MpiLibrary& mpi,
    trm_handle& request,
    Clock::time_point deadline,
    const SignalService& signals,
    const char* call) {
  const auto start = Clock::now();
  const bool serves = signals.here();
  auto nextService = start + kSignalInterval;
  for (;;) {
    int done = 0;
    trm_status status{};
    mpi.check(mpi->test(&request, &done, &status), call);
    if (done != 0) {
      return true;
    }
    const auto now = Clock::now();
    if (now >= deadline) {
      return false;
    }
    if (serves && now >= nextService) {
      signals.serve();
      nextService = Clock::now() + kSignalInterval;
    }
    // Ranks usually come within milliseconds of each other; a late one may take a minute to import its libraries.
    if (now - start < std::chrono::milliseconds(5)) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }
}

std::string missingText(const std::vector<char>& present, double timeout, const char* consequence) {
  std::ostringstream text;
  text << "rank";
  int missing = 0;
  for (size_t rank = 0; rank < present.size(); ++rank) {
    if (present[rank] == 0) {
      text << (missing++ == 0 ? " " : ", ") << rank;
    }
  }
  if (missing == 0) {
    text.str("");
    text << "a rank";
  }
  text << " of " << present.size() << " did not call init_rpc within " << timeout << " s" << consequence
       << ". Check that every rank of the communicator calls init_rpc (see their output for an earlier error), pass "
          "comm= for a smaller group, or raise init_timeout";
  return text.str();
}

// Every rank tells every rank that it is here. A linear exchange lets the flags of those who came arrive although
// others never come, which a tree-shaped collective (MPI_Comm_idup, a barrier) does not. It travels in the parent's
// collective context, so that it cannot meet the user's own messages. When the time is over the flags are read although
// the operation is not complete: they serve the error text alone.
struct CheckIn {
  explicit CheckIn(int size) : present(size, 0), mine(1, 1), counts(size, 1), zeros(size, 0), offsets(size) {
    for (int rank = 0; rank < size; ++rank) {
      offsets[rank] = rank;
    }
  }
  std::vector<char> present;
  std::vector<char> mine;
  std::vector<int> counts, zeros, offsets;
  trm_handle request = 0;
};

// Those that are under way on each communicator: one that was given up goes on, and so does with it the next attempt.
// Another one would not meet that of the ranks that come late, since a communicator's collectives meet in order. By
// MPI's handle, which is not given to another communicator before that.
std::map<trm_handle, std::unique_ptr<CheckIn>>& checkIns() {
  static auto* all = new std::map<trm_handle, std::unique_ptr<CheckIn>>();
  return *all;
}

} // namespace

Communicator::Communicator(std::shared_ptr<MpiLibrary> mpi, trm_handle comm) : mpi_(std::move(mpi)), comm_(comm) {
  mpi_->check((*mpi_)->comm_set_errors_return(comm_), "MPI_Comm_set_errhandler");
  mpi_->check((*mpi_)->comm_rank(comm_, &rank_), "MPI_Comm_rank");
  mpi_->check((*mpi_)->comm_size(comm_, &size_), "MPI_Comm_size");
}

std::shared_ptr<Communicator> Communicator::duplicate(
    std::shared_ptr<MpiLibrary> library,
    intptr_t parentValue,
    double timeout,
    const SignalService& signals) {
  const MpiLibrary& mpi = *library;
  trm_handle parent = 0;
  mpi.check(mpi->comm_from_int(parentValue, &parent), "MPI_Comm_f2c");
  if (parent == mpi->comm_null) {
    throw std::invalid_argument("the communicator is MPI_COMM_NULL or was freed; pass one that is alive");
  }
  int inter = 0;
  mpi.check(mpi->comm_test_inter(parent, &inter), "MPI_Comm_test_inter");
  if (inter != 0) {
    throw std::invalid_argument("an intercommunicator cannot carry RPC; pass comm.Merge() of it");
  }
  int size = 0;
  mpi.check(mpi->comm_size(parent, &size), "MPI_Comm_size");

  const auto deadline = deadlineAfter(timeout);
  auto& checkIn = checkIns()[parent];
  if (checkIn == nullptr) {
    auto begun = std::make_unique<CheckIn>(size);
    mpi.check(
        mpi->ialltoallv(
            begun->mine.data(), begun->counts.data(), begun->zeros.data(), begun->present.data(), begun->counts.data(),
            begun->offsets.data(), parent, &begun->request),
        "MPI_Ialltoallv");
    checkIn = std::move(begun);
  }
  if (!completeBy(mpi, checkIn->request, deadline, signals, "MPI_Ialltoallv")) {
    throw MissingRanks(missingText(checkIn->present, timeout, ""));
  }
  const std::vector<char> present = std::move(checkIn->present);
  checkIns().erase(parent);
  trm_handle duplicated = mpi->comm_null;
  trm_handle request = mpi->request_null;
  // On the heap: MPI writes the new handle when the request completes, maybe after we gave up.
  auto* const result = new trm_handle(duplicated);
  mpi.check(mpi->comm_idup(parent, result, &request), "MPI_Comm_idup");
  if (!completeBy(mpi, request, deadline, signals, "MPI_Comm_idup")) {
    throw MissingRanks(missingText(present, timeout, " (it left while the group formed)"));
  }
  duplicated = *result;
  delete result;
  return std::shared_ptr<Communicator>(new Communicator(std::move(library), duplicated));
}

std::shared_ptr<Communicator> Communicator::group(
    std::shared_ptr<MpiLibrary> mpi,
    intptr_t worldValue,
    const std::vector<int>& ranks) {
  trm_handle world = 0;
  mpi->check((*mpi)->comm_from_int(worldValue, &world), "MPI_Comm_f2c");
  trm_handle group = (*mpi)->comm_null;
  mpi->check(
      (*mpi)->comm_create_group(world, static_cast<int>(ranks.size()), ranks.data(), /*tag=*/0, &group),
      "MPI_Comm_create_group");
  return std::shared_ptr<Communicator>(new Communicator(std::move(mpi), group));
}

std::vector<std::string> Communicator::allgather(
    const std::string& data,
    double timeout,
    const SignalService& signals) {
  const auto deadline = deadlineAfter(timeout);
  // Two rounds of equal pieces, so that one collective suffices: the lengths, then everything padded to the longest.
  auto gather = [&](const std::string& mine) {
    // MPI uses them until the request completes; if that never happens, they stay.
    auto* const buffers = new std::pair<std::string, std::string>(mine, std::string(mine.size() * size_, '\0'));
    trm_handle request = (*mpi_)->request_null;
    mpi_->check(
        (*mpi_)->iallgather(buffers->first.data(), buffers->second.data(), mine.size(), comm_, &request),
        "MPI_Iallgather");
    if (!completeBy(*mpi_, request, deadline, signals, "MPI_Iallgather")) {
      throw MissingRanks(missingText(std::vector<char>(size_, 1), timeout, " (it left while the group formed)"));
    }
    std::string gathered = std::move(buffers->second);
    delete buffers;
    return gathered;
  };
  const uint64_t length = data.size();
  const std::string lengths = gather(std::string(reinterpret_cast<const char*>(&length), sizeof(length)));
  std::vector<uint64_t> sizes(size_);
  std::copy(lengths.begin(), lengths.end(), reinterpret_cast<char*>(sizes.data()));
  uint64_t longest = 1;
  for (const uint64_t bytes : sizes) {
    longest = std::max(longest, bytes);
  }
  std::string padded = data;
  padded.resize(longest);
  const std::string all = gather(padded);
  std::vector<std::string> result;
  result.reserve(size_);
  for (int rank = 0; rank < size_; ++rank) {
    result.push_back(all.substr(rank * longest, sizes[rank]));
  }
  return result;
}

void Communicator::free() {
  if (comm_ != (*mpi_)->comm_null) {
    mpi_->check((*mpi_)->comm_free(&comm_), "MPI_Comm_free");
    comm_ = (*mpi_)->comm_null;
  }
}

} // namespace torch_rpc_mpi
