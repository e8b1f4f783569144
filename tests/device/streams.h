// A stream of the test device: a thread that runs what is queued, in order, after delays that a seed makes. What was
// not waited for through an event has then often not happened, so that a missing wait shows as wrong data.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace rpctest {

using Task = std::function<void()>;
using Tasks = std::vector<Task>;

// All of it under mutex_, but for what never changes and for random_, which is the thread's alone.
class Stream {
 public:
  Stream(int device, uint64_t number);

  int device() const {
    return device_;
  }
  // While the stream captures, the task goes into the graph. A task that throws spoils the stream: what it said is
  // thrown by the next synchronize().
  void push(Task task);
  bool idle();
  void synchronize();
  // Ends the thread after what is queued. The stream itself stays, because others may still look at it.
  void end();
  bool ended();

  // See captures.h.
  void capture(std::shared_ptr<Tasks> graph);
  bool capturing();

 private:
  void start();
  void run();
  void delay();

  const int device_;
  std::minstd_rand random_;
  std::mutex mutex_;
  std::condition_variable pushed_;
  std::condition_variable finished_;
  std::deque<Task> tasks_;
  std::shared_ptr<Tasks> graph_; // of a capture under way
  uint64_t pushes_ = 0;
  uint64_t finishes_ = 0;
  std::string failure_;
  bool started_ = false;
  bool ended_ = false;
};

// Number 0 is the default stream, the others are a pool's. Made at first use, and never destroyed.
Stream* streamOf(int device, int64_t number);
int64_t nextPoolStream(int device, bool highPriority);

// A stream that a caller of the runtime owns.
Stream* makeStream(int device);
int64_t liveStreams(); // of those, the ones that have not been ended

// Waits for all streams of the device.
void synchronizeDevice(int device);

// How often a thread of the process has waited for a stream, a device or an event.
int64_t synchronizations();
void countSynchronization();

} // namespace rpctest
