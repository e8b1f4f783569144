#include "codec/sendable.h"

#include <utility>

#include <c10/core/TensorOptions.h>

namespace torch_rpc_mpi {

namespace {

// Whether what operators do with it is decided in Python or by functorch, as for subclasses with __torch_dispatch__.
bool isWrapper(const at::Tensor& tensor) {
  return tensor.key_set().has_any(
      c10::DispatchKeySet(
          {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
           c10::DispatchKey::Functionalize}));
}

constexpr const char* kNoMemory =
    "it has no memory of its own, as wrappers of other tensors and fake tensors have none. Send an ordinary tensor, or "
    "the ones that it is made of";

// A wrapper of other tensors (subclasses with __torch_dispatch__, FakeTensor, functorch's) has no storage, or one
// without memory, or one that throws when asked for it. A zero tensor has none either, but is materialised.
bool hasMemory(const at::Tensor& tensor) {
  try {
    if (!tensor.has_storage()) {
      return false;
    }
    // An empty tensor needs none, but an empty wrapper is no ordinary tensor either.
    return tensor.storage().data() != nullptr || (tensor.numel() == 0 && !isWrapper(tensor)) || tensor._is_zerotensor();
  } catch (const std::exception&) {
    return false;
  }
}

// Of a tensor that is not on the CPU. Whether the callee has a device for it is for the agent to say.
std::optional<std::string> whyNotSentFrom(const at::Tensor& tensor) {
  if (tensor.is_meta()) {
    return "it is on device \"meta\" and so has no data. Send its shape and dtype, or make it with data "
           "(torch.empty_like(x, device=\"cpu\"))";
  }
  if (tensor.is_quantized()) {
    return "quantized tensors are sent from the CPU only. Send x.cpu()";
  }
  return std::nullopt;
}

} // namespace

bool isPlain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && tensor.has_storage() && !tensor.is_quantized() && !tensor.is_mkldnn() &&
      !tensor.is_nested();
}

bool isSubByte(at::ScalarType type) {
  return type == at::kQUInt4x2 || type == at::kQUInt2x4;
}

const char* memoryOf(const c10::Storage& storage, size_t bytes) {
  if (bytes == 0) {
    return nullptr;
  }
  TORCH_CHECK(
      bytes <= storage.nbytes(), "a tensor shows ", bytes, " bytes of a storage that has only ", storage.nbytes());
  const auto* data = static_cast<const char*>(storage.data());
  TORCH_CHECK(
      data != nullptr, "a tensor has a storage without memory, as wrappers of other tensors and fake ones have");
  return data;
}

at::Tensor bytesOf(c10::Storage storage) {
  // Made by hand, as torch's functions would ask the modes of this thread.
  const auto key = c10::computeDispatchKey(std::nullopt, std::nullopt, storage.device());
  const auto bytes = static_cast<int64_t>(storage.nbytes());
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), c10::scalarTypeToTypeMeta(c10::kByte));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({bytes});
  return tensor;
}

std::optional<std::string> whyNotSent(const at::Tensor& tensor, Place place) {
  if (!tensor.defined()) {
    return std::nullopt;
  }
  if (!tensor.device().is_cpu()) {
    if (auto why = whyNotSentFrom(tensor)) {
      return why;
    }
  }
  if (tensor.is_nested()) {
    return "nested tensors are not sent. Send its parts (x.unbind()), or pad it (torch.nested.to_padded_tensor)";
  }
  switch (tensor.layout()) {
    case at::kStrided:
      if (isSubByte(tensor.scalar_type())) {
        return c10::str("tensors of dtype ", tensor.scalar_type(), " are not sent. Send x.dequantize()");
      }
      if (hasMemory(tensor)) {
        return std::nullopt;
      }
      return kNoMemory;
    case at::kSparse:
      return isWrapper(tensor) ? std::optional<std::string>(kNoMemory) : std::nullopt;
    case at::kSparseCsr:
      if (isWrapper(tensor)) {
        return kNoMemory;
      }
      if (place == Place::kRequest) {
        return std::nullopt;
      }
      return "torch does not return tensors of layout sparse_csr from RPC. Return its parts (x.crow_indices(), "
             "x.col_indices(), x.values()), or x.to_sparse()";
    case at::kMkldnn:
      return "tensors of layout mkldnn are not sent. Send x.to_dense()";
    default:
      return c10::str(
          "tensors of layout ", tensor.layout(), " are not sent. Send its indices and values, or x.to_sparse()");
  }
}

} // namespace torch_rpc_mpi
