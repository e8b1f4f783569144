// What torch asks of an accelerator: pinned memory of the host, the default generators, and the storage's size.
#include <array>
#include <cstring>
#include <map>
#include <mutex>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <torch/version.h>

#include "captures.h"
#include "devices.h"
#include "memory.h"
#include "runtime.h"
#include "torch_allocator.h"
#include "torch_streams.h"

namespace rpctest {

namespace {

constexpr int kPoison = 0xdb;

// Freed memory is kept, overwritten, for the next tensor of its size.
struct PinnedPool {
  std::mutex mutex;
  std::multimap<size_t, void*> free; // under the lock
};

PinnedPool& pinnedPool() {
  static auto* made = new PinnedPool; // never destroyed
  return *made;
}

struct PinnedBlock {
  void* data;
  size_t size;
  PinnedBlock(void* memory, size_t bytes) : data(memory), size(bytes) {}
  ~PinnedBlock() {
    memset(data, kPoison, size);
    const std::lock_guard<std::mutex> lock(pinnedPool().mutex);
    pinnedPool().free.emplace(size, data);
  }
};

void releasePinned(void* context) {
  delete static_cast<std::shared_ptr<PinnedBlock>*>(context);
}

void* pinnedMemory(size_t size) {
  {
    const std::lock_guard<std::mutex> lock(pinnedPool().mutex);
    const auto found = pinnedPool().free.find(size);
    if (found != pinnedPool().free.end()) {
      void* memory = found->second;
      pinnedPool().free.erase(found);
      return memory;
    }
  }
  check(checkNoCapture());
  touch(currentDevice());
  void* memory = nullptr;
  check(allocatePinned(&memory, size));
  return memory;
}

c10::DataPtr allocateForTorch(size_t size) {
  if (size == 0) {
    return {nullptr, c10::Device(c10::DeviceType::CPU)};
  }
  auto* block = new std::shared_ptr<PinnedBlock>(std::make_shared<PinnedBlock>(pinnedMemory(size), size));
  return {(*block)->data, block, &releasePinned, c10::Device(c10::DeviceType::CPU)};
}

#ifdef REGISTER_HOST_ALLOCATOR // torch 2.8
struct PinnedAllocator final : at::HostAllocator {
  bool record_event(void*, void*, c10::Stream) override {
    return true;
  }
  void empty_cache() override {}
  at::HostStats get_stats() override {
    return {};
  }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
#else
struct PinnedAllocator final : c10::Allocator {
#endif
  c10::DataPtr allocate(size_t size) override {
    return allocateForTorch(size);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    memcpy(to, from, size);
  }
};

PinnedAllocator pinned;
#ifdef REGISTER_HOST_ALLOCATOR
REGISTER_HOST_ALLOCATOR(at::DeviceType::PrivateUse1, &pinned)
#endif

// Random numbers come from the CPU's kernels, so this has only a seed and a state.
struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) {
    device_ = asDevice(index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

at::Generator makeGenerator(c10::DeviceIndex index) {
  return at::make_generator<Generator>(index < 0 ? static_cast<c10::DeviceIndex>(currentDevice()) : index);
}

struct Hooks final : at::PrivateUse1HooksInterface {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return rpctest::deviceCount() > 0;
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return makeGenerator(index);
  }
#endif
  bool hasPrimaryContext(c10::DeviceIndex device) const override {
    return hasContext(device);
  }
  c10::DeviceIndex deviceCount() const override {
    return static_cast<c10::DeviceIndex>(rpctest::deviceCount());
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    if (device != currentDevice()) {
      check(rpctestSetDevice(device));
    }
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(currentDevice());
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const c10::DeviceIndex before = getCurrentDevice();
    setCurrentDevice(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    const c10::DeviceIndex before = getCurrentDevice();
    if (device >= 0) {
      rpctest::setCurrentDevice(device);
    }
    return before;
  }
  bool isPinnedPtr(const void* pointer) const override {
    return onPinnedHost(pointer);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned;
  }
  c10::Device getDeviceFromPtr(void* pointer) const override {
    const auto range = rangeOf(pointer);
    TORCH_CHECK(range && range->device >= 0, "rpctest: not memory of a device");
    return asDevice(range->device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    static std::array<at::Generator, 64> generators;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    at::Generator& generator = generators.at(static_cast<size_t>(index < 0 ? currentDevice() : index));
    if (!generator.defined()) {
      generator = makeGenerator(index);
    }
    return generator;
  }
  // What was there is copied on the current stream, on which the old memory is given back.
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    const c10::Device device = storage.device();
    const int before = currentDevice();
    rpctest::setCurrentDevice(device.index());
    c10::DataPtr data = storage.allocator()->allocate(size);
    rpctest::setCurrentDevice(before);
    const size_t kept = std::min(size, storage.nbytes());
    if (kept > 0) {
      currentQueue(device)->push([to = data.get(), from = storage.data(), kept] { memcpy(to, from, kept); });
    }
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(size);
  }
};

[[maybe_unused]] const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 8
REGISTER_GENERATOR_PRIVATEUSE1(makeGenerator)
#endif

} // namespace

c10::Allocator* pinnedAllocator() {
  return &pinned;
}

std::shared_ptr<void> keepPinned(const c10::DataPtr& pointer) {
  return pointer.get_deleter() == &releasePinned ? *static_cast<std::shared_ptr<PinnedBlock>*>(pointer.get_context())
                                                 : nullptr;
}

} // namespace rpctest
