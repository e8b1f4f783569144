// How tensors come to be, are copied and seen anew. A copy is queued as CUDA queues it.
#include <optional>

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "captures.h"
#include "devices.h"
#include "events.h"
#include "memory.h"
#include "torch_aliases.h"
#include "torch_allocator.h"
#include "torch_streams.h"

namespace rpctest {

at::Tensor aliasOf(const at::Tensor& tensor) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  auto alias = at::from_blob(
      const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  alias._set_conj(tensor.is_conj());
  alias._set_neg(tensor.is_neg());
  return alias;
}

void pushKernel(Stream* stream, Task task) {
  touch(stream->device());
  stream->push([task = std::move(task)] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    task();
  });
}

namespace {

using c10::IntArrayRef;
using c10::SymIntArrayRef;

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

c10::Device deviceFor(std::optional<c10::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  at::globalContext().lazyInitDevice(at::kPrivateUse1); // else torch knows of no pinned memory
  const c10::Device chosen = device.value_or(asDevice(currentDevice()));
  const c10::Device with = chosen.has_index() ? chosen : asDevice(currentDevice());
  TORCH_CHECK(physicalDevice(with.index()) >= 0, "rpctest: there is no device ", int{with.index()});
  return with;
}

at::Tensor empty(
    IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device> device,
    std::optional<bool> pin,
    std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(deviceFor(device, pin));
  return at::Tensor(
      at::detail::empty_generic(
          size, c10::GetAllocator(at::kPrivateUse1), kKeys, c10::dtype_or_default(dtype), format));
}

at::Tensor emptyStrided(
    IntArrayRef size,
    IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device> device,
    std::optional<bool> pin) {
  const c10::DeviceGuard guard(deviceFor(device, pin));
  return at::Tensor(
      at::detail::empty_strided_generic(
          size, stride, c10::GetAllocator(at::kPrivateUse1), kKeys, c10::dtype_or_default(dtype)));
}

// One stream waits for what is queued on another.
void order(Stream* before, Stream* after) {
  if (before != after) {
    Event* event = Event::make(before->device(), Event::kDisableTiming);
    event->record(*before);
    event->block(*after);
    Event::destroy(event);
  }
}

void copyAcross(const at::Tensor& from, const at::Tensor& to) {
  Stream* stream = currentQueue(from.device());
  Stream* other = currentQueue(to.device());
  order(other, stream);
  pushKernel(stream, [from = aliasOf(from), to = aliasOf(to)] { to.copy_(from); });
  order(stream, other);
}

// From memory that is not pinned it is taken before this returns, and to such memory it is there when this returns.
void copyWithHost(const at::Tensor& from, const at::Tensor& to, bool nonBlocking) {
  const at::Tensor& host = from.is_cpu() ? from : to;
  Stream* stream = currentQueue(from.is_cpu() ? to.device() : from.device());
  const bool pinned = host.numel() > 0 && onPinnedHost(host.const_data_ptr());
  at::Tensor source = aliasOf(from);
  if (from.is_cpu() && nonBlocking && !pinned) {
    source = at::clone(source, at::MemoryFormat::Contiguous);
  }
  pushKernel(
      stream, [source, target = aliasOf(to), kept = keepPinned(host.storage().data_ptr())] { target.copy_(source); });
  if (!nonBlocking || (to.is_cpu() && !pinned)) {
    check(checkNoCapture());
    countSynchronization();
    stream->synchronize();
  }
}

at::Tensor copyFrom(const at::Tensor& from, const at::Tensor& to, bool nonBlocking) {
  if (to.numel() == 0) {
    return to;
  }
  if (from.is_cpu() || to.is_cpu()) {
    copyWithHost(from, to, nonBlocking);
  } else {
    copyAcross(from, to);
  }
  return to;
}

at::Tensor copyFromAndResize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copyFrom(from, to, false);
}

at::Scalar localScalar(const at::Tensor& self) {
  return at::_local_scalar_dense(self.cpu());
}

void recordStreamOf(at::Tensor& self, c10::Stream stream) {
  recordStream(self.storage().data_ptr(), queueOf(stream));
}

// The views that only some devices have; the others come from these.

at::Tensor asStrided(
    const at::Tensor& self,
    SymIntArrayRef size,
    SymIntArrayRef stride,
    std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

at::Tensor view(const at::Tensor& self, SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshapeAlias(const at::Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(const at::Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& setStorage(at::Tensor& self, c10::Storage source) {
  return at::native::set_(self, std::move(source));
}

at::Tensor& setStorageWithOffset(
    at::Tensor& self,
    c10::Storage source,
    c10::SymInt offset,
    SymIntArrayRef size,
    SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(
      self, std::move(source), offset.guard_int(__FILE__, __LINE__), C10_AS_INTARRAYREF_SLOW(size),
      C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& setEmpty(at::Tensor& self) {
  return at::native::set_(
      self, c10::Storage(c10::Storage::use_byte_size_t(), 0, c10::GetAllocator(at::kPrivateUse1), true));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", emptyStrided);
  library.impl("_copy_from", copyFrom);
  library.impl("_copy_from_and_resize", copyFromAndResize);
  library.impl("_local_scalar_dense", localScalar);
  library.impl("record_stream", recordStreamOf);
  library.impl("as_strided", asStrided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshapeAlias);
  library.impl("unfold", at::native::unfold);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("resize_", resize);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("set_.source_Storage", setStorage);
  library.impl("set_.source_Storage_storage_offset", setStorageWithOffset);
  library.impl("set_", setEmpty);
}

} // namespace

} // namespace rpctest
