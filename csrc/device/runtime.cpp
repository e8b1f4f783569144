#include "device/runtime.h"

#include <array>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <vector>

#include <dlfcn.h>
#include <link.h>

#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/StringUtil.h>

namespace torch_rpc_mpi {

namespace {

constexpr int kNotReady = 600;
constexpr int kCopyDefault = 4; // the runtime sees from the addresses which way
constexpr unsigned kDisableTiming = 2;
constexpr unsigned kPortable = 1;

struct Library {
  std::string path;
  std::string prefix;
};

std::mutex librariesMutex;
std::map<c10::DeviceType, Library>& libraries() { // guarded by librariesMutex
  static auto* all = new std::map<c10::DeviceType, Library>();
  return *all;
}

// The path of a library of this process whose file name begins so; empty if there is none.
std::string loadedLibrary(std::string_view name) {
  struct Search {
    std::string_view name;
    std::string found;
  } search{name, {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& wanted = *static_cast<Search*>(data);
        const std::string_view path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
        if (path.substr(path.rfind('/') + 1).starts_with(wanted.name)) {
          wanted.found = path;
          return 1;
        }
        return 0;
      },
      &search);
  return search.found;
}

void* open(const std::string& path) {
  return path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL | RTLD_NOLOAD);
}

// One of the names that a function has had.
void* findAny(const std::vector<void*>& handles, const std::vector<std::string>& names) {
  for (void* handle : handles) {
    for (const std::string& name : names) {
      if (void* const symbol = handle == nullptr ? nullptr : dlsym(handle, name.c_str())) {
        return symbol;
      }
    }
  }
  return nullptr;
}

Library libraryOf(c10::DeviceType type) {
  {
    const std::lock_guard<std::mutex> lock(librariesMutex);
    const auto found = libraries().find(type);
    if (found != libraries().end()) {
      return found->second;
    }
  }
  // torch built for ROCm calls its devices "cuda" as well.
  if (std::string path = loadedLibrary("libcudart"); type == c10::kCUDA && !path.empty()) {
    return {path, "cuda"};
  }
  if (std::string path = loadedLibrary("libamdhip64"); (type == c10::kCUDA || type == c10::kHIP) && !path.empty()) {
    return {path, "hip"};
  }
  throw DeviceError(
      c10::str(
          "no runtime library for devices of type ", type, " is among those that torch has loaded. Tensors of ", type,
          " devices are sent with torch's builds for CUDA and ROCm"));
}

std::vector<std::string> namesOf(const std::string& prefix, const std::string& name) {
  if (prefix == "hip" && name == "HostAlloc") {
    return {"hipHostMalloc", "hipHostAlloc"};
  }
  if (prefix == "hip" && name == "FreeHost") {
    return {"hipHostFree"};
  }
  return {prefix + name};
}

void* findStreamHandle(const Library& library, void* handle) {
  return findAny(
      {handle, open(loadedLibrary("libc10_cuda")), open(loadedLibrary("libc10_hip"))},
      {library.prefix + "StreamHandle", "_ZNK3c104cuda10CUDAStream6streamEv", "_ZNK3c103hip9HIPStream6streamEv"});
}

} // namespace

void DeviceRuntime::useLibrary(c10::DeviceType type, std::string library, std::string prefix) {
  const std::lock_guard<std::mutex> lock(librariesMutex);
  libraries()[type] = {std::move(library), std::move(prefix)};
}

std::shared_ptr<const DeviceRuntime> DeviceRuntime::find(c10::DeviceType type) {
  const Library library = libraryOf(type);
  void* const handle = open(library.path);
  const auto need = [&](void* symbol, const char* name) {
    if (symbol == nullptr) {
      throw DeviceError(c10::str("the runtime library ", library.path, " has no function ", library.prefix, name));
    }
    return symbol;
  };
  RuntimeTable table;
  const auto fill = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(
        need(findAny({handle}, namesOf(library.prefix, name)), name));
  };
#define RUNTIME_FUNCTION(name, parameters) fill(table.name, #name);
#include "device/runtime_functions.h"
#undef RUNTIME_FUNCTION
  fill(table.GetErrorString, "GetErrorString");
  fill(table.GetLastError, "GetLastError");
  table.streamHandle = reinterpret_cast<decltype(table.streamHandle)>(
      need(findStreamHandle(library, handle), "StreamHandle, nor torch one for the handles of its streams"));
  return std::make_shared<const DeviceRuntime>(type, table, library.path);
}

void DeviceRuntime::check(int status, const char* function) const {
  if (status != 0) {
    (void)table_.GetLastError(); // else torch's next check would find it
    throw DeviceError(c10::str(function, ": ", table_.GetErrorString(status), " (", status, ")"));
  }
}

void DeviceRuntime::copy(void* to, const void* from, size_t bytes, void* stream) const {
  if (bytes > 0) {
    check(table_.MemcpyAsync(to, from, bytes, kCopyDefault, stream), "MemcpyAsync");
  }
}

void DeviceRuntime::waitFor(void* stream, void* event) const {
  check(table_.StreamWaitEvent(stream, event, 0), "StreamWaitEvent");
}

void DeviceRuntime::record(void* event, void* stream) const {
  check(table_.EventRecord(event, stream), "EventRecord");
}

bool DeviceRuntime::complete(void* event) const {
  const int status = table_.EventQuery(event);
  if (status == kNotReady) {
    (void)table_.GetLastError();
    return false;
  }
  check(status, "EventQuery");
  return true;
}

void* DeviceRuntime::createEvent() const {
  void* event = nullptr;
  check(table_.EventCreateWithFlags(&event, kDisableTiming), "EventCreateWithFlags");
  return event;
}

void DeviceRuntime::destroyEvent(void* event) const noexcept {
  if (table_.EventDestroy(event) != 0) {
    (void)table_.GetLastError();
  }
}

void* DeviceRuntime::allocatePinned(size_t bytes) const {
  void* memory = nullptr;
  check(table_.HostAlloc(&memory, bytes, kPortable), "HostAlloc");
  return memory;
}

void DeviceRuntime::freePinned(void* memory) const noexcept {
  if (table_.FreeHost(memory) != 0) {
    (void)table_.GetLastError();
  }
}

// By torch's guard, which does not make a context on the device that it goes back to.
OnDevice::OnDevice(const DeviceRuntime& runtime, c10::DeviceIndex device) : runtime_(runtime), device_(device) {
  before_ = c10::impl::VirtualGuardImpl(runtime_.type()).exchangeDevice({runtime_.type(), device_}).index();
}

OnDevice::~OnDevice() {
  if (before_ != device_) {
    c10::impl::VirtualGuardImpl(runtime_.type()).uncheckedSetDevice({runtime_.type(), before_});
  }
}

RelaxedCapture::RelaxedCapture(const DeviceRuntime& runtime) : runtime_(runtime) {
  (void)runtime_.table().ThreadExchangeStreamCaptureMode(&mode_);
}

RelaxedCapture::~RelaxedCapture() {
  (void)runtime_.table().ThreadExchangeStreamCaptureMode(&mode_);
}

} // namespace torch_rpc_mpi
