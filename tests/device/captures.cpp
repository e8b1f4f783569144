#include "captures.h"

#include <atomic>
#include <map>
#include <mutex>
#include <thread>

#include "errors.h"

namespace rpctest {

namespace {

struct Capture {
  std::thread::id thread;
  int mode;
  std::shared_ptr<Tasks> graph;
  bool spoiled = false;
};

// Never destroyed, as the streams.
struct Captures {
  std::mutex mutex;
  std::map<Stream*, Capture> underWay;
  std::atomic<int> count{0}; // of those
};

Captures& captures() {
  static auto* all = new Captures;
  return *all;
}

thread_local int threadMode = kGlobal;

// By the rules of cudaStreamBeginCapture: a capture forbids them to its own thread unless it is relaxed, and a global
// one to all threads; a thread's own mode excuses it from other threads' captures or from all.
bool forbids(const Capture& capture) {
  if (threadMode == kRelaxed || capture.mode == kRelaxed) {
    return false;
  }
  return capture.thread == std::this_thread::get_id() || (capture.mode == kGlobal && threadMode == kGlobal);
}

} // namespace

int checkNoCapture() {
  if (captures().count == 0) {
    return kSuccess;
  }
  const std::lock_guard<std::mutex> lock(captures().mutex);
  int error = kSuccess;
  for (auto& [stream, capture] : captures().underWay) {
    if (forbids(capture)) {
      capture.spoiled = true;
      error = kStreamCaptureUnsupported;
    }
  }
  return error;
}

int exchangeCaptureMode(int* mode) {
  if (*mode < kGlobal || *mode > kRelaxed) {
    return kInvalidValue;
  }
  std::swap(threadMode, *mode);
  return kSuccess;
}

int beginCapture(Stream* stream, int mode) {
  if (mode < kGlobal || mode > kRelaxed) {
    return kInvalidValue;
  }
  const std::lock_guard<std::mutex> lock(captures().mutex);
  const Capture capture{std::this_thread::get_id(), mode, std::make_shared<Tasks>()};
  if (!captures().underWay.emplace(stream, capture).second) {
    return kInvalidValue;
  }
  stream->capture(capture.graph);
  ++captures().count;
  return kSuccess;
}

int endCapture(Stream* stream, std::shared_ptr<Tasks>* graph) {
  const std::lock_guard<std::mutex> lock(captures().mutex);
  const auto found = captures().underWay.find(stream);
  if (found == captures().underWay.end()) {
    return kInvalidValue;
  }
  const Capture capture = found->second;
  captures().underWay.erase(found);
  --captures().count;
  stream->capture(nullptr);
  if (capture.spoiled) {
    return kStreamCaptureInvalidated;
  }
  *graph = capture.graph;
  return kSuccess;
}

} // namespace rpctest
