// The caching allocator of the devices. Memory that was freed is used again at once on the stream that it was made for,
// and not before recorded streams are done with it. What is freed is overwritten in that stream's order, so that who
// reads it too late gets what nobody wrote.
#include "torch_allocator.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "captures.h"
#include "devices.h"
#include "events.h"
#include "memory.h"
#include "runtime.h"
#include "torch_streams.h"

namespace rpctest {

namespace {

constexpr int kPoison = 0xdb;
constexpr size_t kSegmentBytes = size_t{2} << 20; // holds the small blocks, several to a segment
constexpr size_t kLargestSmall = size_t{1} << 20;
constexpr size_t kLeastBlock = 512;

struct Block {
  char* data;
  size_t size;
  int device;
  Stream* stream;
  std::vector<Stream*> users; // other streams
};

struct DestroyEvent {
  void operator()(Event* event) const {
    Event::destroy(event);
  }
};
using OwnedEvent = std::unique_ptr<Event, DestroyEvent>;

struct Pending {
  Block* block;
  std::vector<OwnedEvent> events;
};

// All under mutex, but for the counts.
struct Pool {
  using Key = std::tuple<int, Stream*, size_t>;

  std::mutex mutex;
  std::multimap<Key, Block*> free;
  std::list<Pending> pending;
  std::map<std::tuple<int, Stream*>, std::pair<char*, size_t>> segments; // what is left of the latest
  std::atomic<int64_t> blocks{0};
  std::atomic<int64_t> bytes{0};
};

Pool& pool() {
  static auto* made = new Pool; // never destroyed: tensors may be freed when the process ends
  return *made;
}

size_t rounded(size_t size) {
  if (size > kLargestSmall) {
    return (size + kSegmentBytes - 1) / kSegmentBytes * kSegmentBytes;
  }
  size_t block = kLeastBlock;
  while (block < size) {
    block *= 2;
  }
  return block;
}

// What follows is under the lock.

void release(Block* block) {
  if (!block->stream->capturing()) { // else a part of the graph
    block->stream->push([data = block->data, size = block->size] { memset(data, kPoison, size); });
  }
  pool().free.emplace(Pool::Key{block->device, block->stream, block->size}, block);
}

void releaseWhatIsDone() {
  pool().pending.remove_if([](Pending& pending) {
    const bool done = std::all_of(
        pending.events.begin(), pending.events.end(), [](const OwnedEvent& event) { return event->query(); });
    if (done) {
      release(pending.block);
    }
    return done;
  });
}

char* newMemory(size_t size, int device) {
  void* memory = nullptr;
  check(allocateDevice(&memory, size, device));
  return static_cast<char*>(memory);
}

char* carve(size_t size, int device, Stream* stream) {
  if (size > kLargestSmall) {
    return newMemory(size, device);
  }
  auto& [rest, left] = pool().segments[{device, stream}];
  if (left < size) {
    rest = newMemory(kSegmentBytes, device);
    left = kSegmentBytes;
  }
  left -= size;
  return std::exchange(rest, rest + size);
}

Block* take(size_t size, int device, Stream* stream) {
  releaseWhatIsDone();
  const auto [first, last] = pool().free.equal_range(Pool::Key{device, stream, size});
  if (first != last) {
    const auto latest = std::prev(last); // whoever still uses it is soonest found out
    Block* block = latest->second;
    pool().free.erase(latest);
    return block;
  }
  return new Block{carve(size, device, stream), size, device, stream, {}};
}

void freeBlock(void* context) {
  auto* block = static_cast<Block*>(context);
  --pool().blocks;
  pool().bytes -= static_cast<int64_t>(block->size);
  const std::lock_guard<std::mutex> lock(pool().mutex);
  if (block->users.empty()) {
    release(block);
    return;
  }
  Pending pending{block, {}};
  for (Stream* user : block->users) {
    OwnedEvent event(Event::make(user->device(), Event::kDisableTiming));
    event->record(*user);
    pending.events.push_back(std::move(event));
  }
  block->users.clear();
  pool().pending.push_back(std::move(pending));
}

struct CachingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const int device = currentDevice();
    touch(device);
    if (size == 0) {
      return {nullptr, asDevice(device)};
    }
    Stream* stream = currentQueue(asDevice(device));
    const std::lock_guard<std::mutex> lock(pool().mutex);
    Block* block = take(rounded(size), device, stream);
    ++pool().blocks;
    pool().bytes += static_cast<int64_t>(block->size);
    return {block->data, block, &freeBlock, asDevice(device)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }

  void copy_data(void* to, const void* from, std::size_t size) const override {
    currentQueue(asDevice(currentDevice()))->push([to, from, size] { memcpy(to, from, size); });
  }
};

CachingAllocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator)

} // namespace

void recordStream(const c10::DataPtr& pointer, Stream* stream) {
  if (pointer.get_deleter() != &freeBlock) {
    return; // of another allocator
  }
  auto* block = static_cast<Block*>(pointer.get_context());
  const std::lock_guard<std::mutex> lock(pool().mutex);
  auto& users = block->users;
  if (stream != block->stream && std::find(users.begin(), users.end(), stream) == users.end()) {
    users.push_back(stream);
  }
}

int64_t liveBlocks() {
  return pool().blocks;
}

int64_t liveBytes() {
  return pool().bytes;
}

} // namespace rpctest

// Large blocks go back to the device; small ones share their segments and stay.
void rpctestEmptyCache() {
  using namespace rpctest;
  for (int device = 0; device < deviceCount(); ++device) {
    synchronizeDevice(device);
  }
  const std::lock_guard<std::mutex> lock(pool().mutex);
  releaseWhatIsDone();
  for (int device = 0; device < deviceCount(); ++device) {
    synchronizeDevice(device); // they have been overwritten
  }
  for (auto at = pool().free.begin(); at != pool().free.end();) {
    Block* block = at->second;
    if (block->size <= kLargestSmall) {
      ++at;
      continue;
    }
    freeDevice(block->data);
    delete block;
    at = pool().free.erase(at);
  }
}
