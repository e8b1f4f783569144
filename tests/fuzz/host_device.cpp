#include "host_device.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include <ATen/Utils.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "tensor_reading.h"

namespace torch_rpc_mpi::fuzz {

namespace {

constexpr size_t kMostMemory = size_t{64} << 20; // of an allocation
// Where what neighbours lend begins: no memory of this process.
constexpr uintptr_t kLent = uintptr_t{1} << 60;

thread_local c10::DeviceIndex current = 0;
thread_local std::array<c10::StreamId, kDevices> streams{};
std::atomic<size_t> allocations{0};
uintptr_t events = 0;
size_t questions = 0;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kDeviceType> {
  c10::Device exchangeDevice(c10::Device device) const override {
    return {kDeviceType, std::exchange(current, device.index())};
  }
  c10::Device getDevice() const override {
    return {kDeviceType, current};
  }
  void setDevice(c10::Device device) const override {
    current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current = device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::UNSAFE, device, streams[static_cast<size_t>(device.index())]);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, 1);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    const auto before = std::exchange(streams[static_cast<size_t>(stream.device_index())], stream.id());
    return c10::Stream(c10::Stream::UNSAFE, stream.device(), before);
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kDevices;
  }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

void* allocate(size_t bytes) {
  void* const memory = bytes > kMostMemory ? nullptr : std::malloc(std::max<size_t>(bytes, 1));
  allocations += memory != nullptr;
  return memory;
}

void release(void* memory) {
  allocations -= memory != nullptr;
  std::free(memory);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const memory = fuzz::allocate(bytes);
    TORCH_CHECK(memory != nullptr, "the device has no memory for ", bytes, " bytes");
    return {memory, memory, &release, c10::Device(kDeviceType, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

template <typename T>
int given(void** memory, T* made) {
  *memory = made;
  return made == nullptr ? 2 : 0;
}

RuntimeTable table() {
  RuntimeTable table;
  table.GetDevice = [](int* device) {
    *device = current;
    return 0;
  };
  table.SetDevice = [](int device) {
    current = static_cast<c10::DeviceIndex>(device);
    return 0;
  };
  table.Malloc = [](void** memory, size_t bytes) { return given(memory, allocate(bytes)); };
  table.Free = [](void* memory) {
    release(memory);
    return 0;
  };
  table.HostAlloc = [](void** memory, size_t bytes, unsigned) { return given(memory, std::malloc(bytes)); };
  table.FreeHost = [](void* memory) {
    std::free(memory);
    return 0;
  };
  table.MemcpyAsync = [](void* to, const void* from, size_t bytes, int, void*) {
    if (reinterpret_cast<uintptr_t>(from) >= kLent) {
      std::memset(to, 7, bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
    return 0;
  };
  table.StreamWaitEvent = [](void*, void*, unsigned) { return 0; };
  table.EventCreateWithFlags = [](void** event, unsigned) {
    *event = reinterpret_cast<void*>(++events);
    return 0;
  };
  table.EventDestroy = [](void*) { return 0; };
  table.EventRecord = [](void*, void*) { return 0; };
  table.EventQuery = [](void*) {
    constexpr int kNotReady = 600;
    return ++questions % 3 == 0 ? kNotReady : 0;
  };
  table.IpcGetMemHandle = [](IpcHandle*, void*) { return 0; };
  table.IpcOpenMemHandle = [](void** memory, IpcHandle handle, unsigned) {
    *memory = reinterpret_cast<void*>(kLent);
    return handle.reserved[0] == 1 ? 201 : 0;
  };
  table.IpcCloseMemHandle = [](void*) { return 0; };
  table.DeviceCanAccessPeer = [](int* can, int, int) {
    *can = 1;
    return 0;
  };
  table.ThreadExchangeStreamCaptureMode = [](int*) { return 0; };
  table.GetErrorString = [](int) { return "refused"; };
  table.GetLastError = [] { return 0; };
  table.streamHandle = [](const c10::Stream* stream) { return reinterpret_cast<void*>(stream->id()); };
  return table;
}

} // namespace

std::shared_ptr<Devices> makeDevices(int neighbours) {
  static Memory memory;
  static const auto runtime = std::make_shared<const DeviceRuntime>(kDeviceType, table(), "of the fuzzers");
  c10::SetAllocator(kDeviceType, &memory);
  current = 0;
  streams = {};
  events = questions = 0;
  std::vector<c10::Device> all;
  std::vector<DeviceName> names;
  for (int i = 0; i < kDevices; ++i) {
    all.emplace_back(kDeviceType, static_cast<c10::DeviceIndex>(i));
    DeviceName& name = names.emplace_back();
    name = {'G', 'P', 'U', static_cast<char>('0' + i)};
  }
  auto devices = std::make_shared<Devices>(runtime, all, kDeviceChunk, /*mpiTakesMemory=*/false);
  devices->share(names, std::vector<bool>(static_cast<size_t>(neighbours), true), kMostMemory);
  return devices;
}

size_t deviceAllocations() {
  return allocations;
}

at::Tensor deviceTensor(c10::DeviceIndex device, size_t bytes) {
  current = device;
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, c10::GetAllocator(kDeviceType)->allocate(bytes));
  current = 0;
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), caffe2::TypeMeta::Make<uint8_t>());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({static_cast<int64_t>(bytes)});
  return tensor;
}

void readAll(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kDeviceType) {
    try {
      testing::readAll(tensor);
    } catch (const c10::Error&) { // an operator of torch does not take such a tensor
    }
    return;
  }
  const c10::Storage& storage = tensor.storage();
  const auto* bytes = static_cast<const volatile char*>(storage.data());
  for (size_t i = 0; i < storage.nbytes(); i += 64) {
    (void)bytes[i];
  }
  (void)(storage.nbytes() > 0 && bytes[storage.nbytes() - 1] != 0);
}

} // namespace torch_rpc_mpi::fuzz
