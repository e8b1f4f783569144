// Compares csrc/device/runtime_functions.h with the header of CUDA's runtime, at compile time: this file compiles or
// the table is wrong. test_device_runtime.py compiles it, with the constants that it finds in csrc/device.
#include <type_traits>

#include <cuda_runtime_api.h>

struct IpcHandle {
  char reserved[64];
};

namespace {

// Whether a function of C takes or returns both in the same way. Streams and events are pointers to what only the
// runtime knows, and to us void*; enumerations are int.
template <typename Ours, typename Theirs>
constexpr bool passedAlike = sizeof(Ours) == sizeof(Theirs) && alignof(Ours) == alignof(Theirs) &&
    std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> && std::is_class_v<Ours> == std::is_class_v<Theirs> &&
    std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs>;

// Of pointers, what they point to as well.
template <typename Ours, typename Theirs>
constexpr bool alike() {
  if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
    using OurTarget = std::remove_pointer_t<Ours>;
    using TheirTarget = std::remove_pointer_t<Theirs>;
    if constexpr (!std::is_void_v<OurTarget> && !std::is_void_v<TheirTarget>) {
      return std::is_const_v<OurTarget> == std::is_const_v<TheirTarget> && passedAlike<OurTarget, TheirTarget>;
    }
  }
  return passedAlike<Ours, Theirs>;
}

template <typename... Ours, typename... Theirs>
constexpr bool calledAlike(int (*)(Ours...), cudaError_t (*)(Theirs...)) {
  if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
    return (alike<Ours, Theirs>() && ...);
  }
  return false;
}

static_assert(alike<int, cudaError_t>() && alike<void*, cudaStream_t>() && alike<IpcHandle*, cudaIpcMemHandle_t*>());
static_assert(!alike<int*, size_t*>() && !alike<int, size_t>() && !alike<void*, size_t>() && !alike<IpcHandle, int>());
static_assert(cudaSuccess == 0);
static_assert(std::is_trivially_copyable_v<cudaIpcMemHandle_t> && std::is_trivially_copyable_v<cudaIpcEventHandle_t>);

#define RUNTIME_FUNCTION(name, parameters) \
  static_assert(calledAlike(static_cast<int(*) parameters>(nullptr), &cuda##name), "cuda" #name);
#include "device/runtime_functions.h"
#undef RUNTIME_FUNCTION
static_assert(std::is_same_v<const char*(cudaError_t), std::remove_pointer_t<decltype(&cudaGetErrorString)>>);
static_assert(calledAlike(static_cast<int (*)()>(nullptr), &cudaGetLastError));

} // namespace
