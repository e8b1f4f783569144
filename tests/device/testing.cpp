// For tests alone: what a device has done and holds, captures, and streams that stand still.
#include <chrono>
#include <future>
#include <memory>
#include <thread>

#include "captures.h"
#include "devices.h"
#include "errors.h"
#include "runtime.h"
#include "runtime_calls.h"
#include "torch_allocator.h"

using namespace rpctest;

struct rpctest::Graph {
  std::shared_ptr<Tasks> tasks;
};

int rpctestStreamBeginCapture(int device, int64_t stream, int mode) {
  return result(beginCapture(streamOf(device, stream), mode));
}

int rpctestStreamEndCapture(int device, int64_t stream, Graph** graph) {
  std::shared_ptr<Tasks> tasks;
  const int error = endCapture(streamOf(device, stream), &tasks);
  if (error == kSuccess) {
    *graph = new Graph{std::move(tasks)};
  }
  return result(error);
}

int rpctestGraphLaunch(Graph* graph, int device, int64_t stream) {
  for (const Task& task : *graph->tasks) {
    streamOf(device, stream)->push(task);
  }
  return kSuccess;
}

void rpctestGraphDestroy(Graph* graph) {
  delete graph;
}

void* rpctestNumberedStream(int device, int64_t stream) {
  return streamOf(device, stream);
}

void rpctestSleep(int device, int64_t stream, int64_t microseconds) {
  streamOf(device, stream)->push([microseconds] {
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
  });
}

void* rpctestHold(int device, int64_t stream) {
  auto* hold = new std::promise<void>;
  streamOf(device, stream)->push([until = hold->get_future().share()] { until.wait(); });
  return hold;
}

void rpctestLetGo(void* hold) {
  auto* promise = static_cast<std::promise<void>*>(hold);
  promise->set_value();
  delete promise;
}

void rpctestReturnToDevice(int device) {
  setCurrentDevice(device);
}

int rpctestSynchronizeDevice(int device) {
  const int error = checkNoCapture();
  if (error == kSuccess) {
    countSynchronization();
    synchronizeDevice(device);
  }
  return result(error);
}

int rpctestPhysicalDevice(int device) {
  return physicalDevice(device);
}

uint64_t rpctestContexts() {
  return contexts();
}

int rpctestInBadFork() {
  return inBadFork() ? 1 : 0;
}

void rpctestAllowIpc(int allowed) {
  allowIpc(allowed != 0);
}

void rpctestCounts(int64_t* counts) {
  for (const int64_t count :
       {live(Counted::kAllocations), live(Counted::kPinned), live(Counted::kRegistered), live(Counted::kOpened),
        liveEvents(), liveStreams(), liveBlocks(), liveBytes(), synchronizations()}) {
    *counts++ = count;
  }
}
