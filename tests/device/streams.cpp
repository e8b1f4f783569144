#include "streams.h"

#include <atomic>
#include <chrono>
#include <exception>
#include <map>
#include <stdexcept>
#include <thread>
#include <utility>

#include <pthread.h>

#include "devices.h"

namespace rpctest {

namespace {

constexpr int64_t kPoolStreams = 32;

// Never destroyed: threads of streams are still there when the process ends.
struct Registry {
  std::mutex mutex;
  std::map<std::pair<int, int64_t>, Stream*> numbered;
  std::vector<Stream*> all;
  std::map<std::pair<int, bool>, int64_t> next; // of the pool, by device and whether it is that of high priority
  uint64_t made = 0;
  int64_t owned = 0;
};

Registry& registry() {
  static auto* streams = new Registry;
  return *streams;
}

std::atomic<int64_t> waits{0};

// Under the registry's lock.
Stream* addStream(int device) {
  auto* stream = new Stream(device, ++registry().made);
  registry().all.push_back(stream);
  return stream;
}

} // namespace

Stream::Stream(int device, uint64_t number)
    : device_(device),
      random_(static_cast<uint32_t>(environmentNumber("RPCTEST_SEED", 0) * 1000 + static_cast<int64_t>(number))) {}

void Stream::push(Task task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (graph_) {
    graph_->push_back(std::move(task));
    return;
  }
  if (!std::exchange(started_, true)) {
    start();
  }
  tasks_.push_back(std::move(task));
  ++pushes_;
  pushed_.notify_one();
}

bool Stream::idle() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return finishes_ == pushes_;
}

void Stream::synchronize() {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t awaited = pushes_;
  finished_.wait(lock, [&] { return finishes_ >= awaited; });
  if (!failure_.empty()) {
    throw std::runtime_error("a task of a stream of the test device failed: " + std::exchange(failure_, ""));
  }
}

void Stream::end() {
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    --registry().owned;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ended_ = true;
  pushed_.notify_one();
}

bool Stream::ended() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return ended_;
}

void Stream::capture(std::shared_ptr<Tasks> graph) {
  const std::lock_guard<std::mutex> lock(mutex_);
  graph_ = std::move(graph);
}

bool Stream::capturing() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return graph_ != nullptr;
}

void Stream::start() {
  std::thread thread([this] {
    pthread_setname_np(pthread_self(), "rpctest_stream");
    run();
  });
  thread.detach();
}

void Stream::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    pushed_.wait(lock, [&] { return !tasks_.empty() || ended_; });
    if (tasks_.empty()) {
      return;
    }
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    delay();
    std::string failure;
    try {
      task();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    task = nullptr; // before anybody learns that it is done
    lock.lock();
    if (failure_.empty()) {
      failure_ = std::move(failure);
    }
    ++finishes_;
    finished_.notify_all();
  }
}

// One task in four is late. Without a seed none is.
void Stream::delay() {
  static const bool seeded = environmentNumber("RPCTEST_SEED", -1) >= 0;
  static const auto longest = environmentNumber("RPCTEST_DELAY_US", 1000);
  if (seeded && longest > 0 && random_() % 4 == 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(static_cast<int64_t>(random_()) % longest));
  }
}

Stream* streamOf(int device, int64_t number) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  Stream*& stream = registry().numbered[{device, number}];
  if (stream == nullptr) {
    stream = addStream(device);
  }
  return stream;
}

int64_t nextPoolStream(int device, bool highPriority) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  return registry().next[{device, highPriority}]++ % kPoolStreams + 1 + (highPriority ? kPoolStreams : 0);
}

Stream* makeStream(int device) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  ++registry().owned;
  return addStream(device);
}

int64_t liveStreams() {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  return registry().owned;
}

void synchronizeDevice(int device) {
  std::vector<Stream*> streams;
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    streams = registry().all;
  }
  for (Stream* stream : streams) {
    if (stream->device() == device) {
      stream->synchronize();
    }
  }
}

int64_t synchronizations() {
  return waits;
}

void countSynchronization() {
  ++waits;
}

} // namespace rpctest
