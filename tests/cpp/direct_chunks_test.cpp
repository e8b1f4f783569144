// What a GPU-aware MPI takes from a device's memory and puts there, over a runtime whose events the test completes.
#include "codec/direct_chunks.h"

#include <array>
#include <set>

#include "check.h"

using namespace torch_rpc_mpi;

namespace {

constexpr auto kType = c10::kPrivateUse1;

// Events are numbers, and so are streams.
struct Runtime {
  Runtime() {
    done.clear();
    recorded.clear();
    made = 0;
    broken = false;
  }
  static std::shared_ptr<const DeviceRuntime> make() {
    RuntimeTable table;
    table.EventCreateWithFlags = [](void** event, unsigned) {
      *event = reinterpret_cast<void*>(++made);
      return 0;
    };
    table.EventDestroy = [](void*) { return 0; };
    table.EventRecord = [](void* event, void*) {
      recorded.insert(reinterpret_cast<uintptr_t>(event));
      return broken ? 1 : 0;
    };
    table.EventQuery = [](void* event) {
      constexpr int kNotReady = 600;
      return done.contains(reinterpret_cast<uintptr_t>(event)) ? 0 : kNotReady;
    };
    table.ThreadExchangeStreamCaptureMode = [](int*) { return 0; };
    table.GetErrorString = [](int) { return "broken"; };
    table.GetLastError = [] { return 0; };
    table.streamHandle = [](const c10::Stream*) -> void* { return nullptr; };
    return std::make_shared<const DeviceRuntime>(kType, table, "fake");
  }
  static inline std::set<uintptr_t> done, recorded;
  static inline uintptr_t made = 0;
  static inline bool broken = false;

  const c10::Device device{kType, 0};
  const c10::Stream stream{c10::Stream::UNSAFE, device, 0};
  const std::shared_ptr<Devices> devices = std::make_shared<Devices>(make(), std::vector{device}, 4, true);
};

struct Memory {
  std::array<char, 10> bytes{};
  c10::Storage storage{c10::Storage::use_byte_size_t(), bytes.size(), at::DataPtr(bytes.data(), c10::Device(kType, 0))};
};

} // namespace

TEST(direct_chunks_leave_from_the_memory_once_its_stream_is_that_far) {
  const Runtime runtime;
  Memory memory;
  const auto source = directSource(runtime.devices, runtime.stream, {memory.bytes.data(), 10}, memory.storage);
  CHECK_EQUAL(source->chunks(), 3U);
  CHECK_THAT(!source->next());
  CHECK_EQUAL(Runtime::recorded.size(), 1U);
  Runtime::done = Runtime::recorded;
  for (const size_t offset : {0, 4, 8}) {
    const auto chunk = source->next();
    CHECK_THAT(chunk && chunk->data == memory.bytes.data() + offset);
    CHECK_EQUAL(chunk->bytes, std::min<size_t>(4, 10 - offset));
  }
  source->sent();
  CHECK_EQUAL(runtime.devices->counters.sentMpi, 4U);
  source->sent();
  source->sent();
  CHECK_EQUAL(runtime.devices->counters.sentMpi, 10U);
}

TEST(direct_chunks_of_an_abandoned_part_keep_the_memory_while_mpi_may_read_it) {
  const Runtime runtime;
  Memory memory;
  const auto make = [&] {
    return directSource(runtime.devices, runtime.stream, {memory.bytes.data(), 10}, memory.storage);
  };
  const auto unread = make(), read = make(), reading = make();
  CHECK_EQUAL(memory.storage.use_count(), 4U);
  Runtime::done = Runtime::recorded;
  CHECK_THAT(read->next() && reading->next());
  read->sent();
  for (ChunkSource* source : {unread.get(), read.get(), reading.get()}) {
    source->abandon();
  }
  CHECK_EQUAL(memory.storage.use_count(), 2U); // of `reading`
}

TEST(direct_chunks_come_to_the_memory_once_its_stream_is_that_far) {
  const Runtime runtime;
  Memory memory;
  const auto sink = directSink(runtime.devices, runtime.stream, {memory.bytes.data(), 10});
  CHECK_THAT(!sink->next() && !sink->keepsMemory());
  Runtime::done = Runtime::recorded;
  const auto first = sink->next(), second = sink->next();
  CHECK_THAT(first && first->data == memory.bytes.data() && second && second->data == memory.bytes.data() + 4);
  sink->received();
  CHECK_THAT(sink->keepsMemory());
  sink->received();
  CHECK_THAT(!sink->keepsMemory());
  CHECK_EQUAL(runtime.devices->counters.receivedMpi, 8U);
}

TEST(direct_chunks_without_memory_wait_for_nothing) {
  const Runtime runtime;
  const auto sink = directSink(runtime.devices, runtime.stream, {nullptr, 10});
  for (const size_t bytes : {4, 4, 2}) {
    const auto chunk = sink->next();
    CHECK_THAT(chunk && chunk->data == nullptr);
    CHECK_EQUAL(chunk->bytes, bytes);
  }
  CHECK_THAT(!sink->keepsMemory());
  CHECK_EQUAL(Runtime::made, 0U);
}

TEST(direct_chunks_of_a_broken_device_fail_with_its_reason) {
  const Runtime runtime;
  Memory memory;
  Runtime::broken = true;
  CHECK_THROWS(
      directSource(runtime.devices, runtime.stream, {memory.bytes.data(), 10}, memory.storage),
      "EventRecord: broken (1)");
  const auto sink = directSink(runtime.devices, runtime.stream, {memory.bytes.data(), 10});
  CHECK_THROWS(sink->next(), "EventRecord: broken (1)");
}
