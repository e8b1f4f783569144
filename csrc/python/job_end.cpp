#include "python/job_end.h"

#include <atomic>
#include <cstdio>
#include <thread>
#include <utility>

#include <unistd.h>

#include <c10/util/Logging.h>
#include <torch/csrc/utils/pybind.h>

#include "base/deadline.h"
#include "host/launcher_output.h"
#include "host/resources.h"

namespace torch_rpc_mpi {

namespace {

// Immutable once made, and never destroyed: two threads may come to use it when the process ends.
struct JobEnd {
  std::shared_ptr<MpiLibrary> mpi;
  intptr_t world;
  std::string text;
  int status;
};
const JobEnd* jobEnd = nullptr;
std::atomic<bool> begun{false};

void endJob() {
  if (begun.exchange(true)) {
    for (;;) {
      pause(); // another thread ends it
    }
  }
  if (jobEnd->mpi->finalized()) {
    return; // there is no job any more
  }
  std::fprintf(stderr, "torch_rpc_mpi: %s\n", jobEnd->text.c_str());
  std::fflush(nullptr);
  waitUntilRead(STDOUT_FILENO);
  waitUntilRead(STDERR_FILENO);
  jobEnd->mpi->abort(jobEnd->world, jobEnd->status);
}

} // namespace

void endJobAtExit(std::shared_ptr<MpiLibrary> mpi, intptr_t world, std::string text, int status, double limit) {
  if (jobEnd != nullptr) {
    return;
  }
  jobEnd = new JobEnd{std::move(mpi), world, std::move(text), status};
  // What finalises MPI was registered first, and so runs after this.
  if (Py_AtExit(endJob) != 0) {
    limit = 0; // there is no place left for it
  }
  try {
    startThread("what ends the job", [limit] {
      std::this_thread::sleep_for(durationOf<std::chrono::nanoseconds>(limit));
      endJob();
    }).detach();
  } catch (const std::exception& error) { // it does without
    LOG(WARNING) << "A job whose rank has failed may not end in time: " << error.what();
  }
}

} // namespace torch_rpc_mpi
