#include <limits>
#include <unordered_map>
#include <unordered_set>

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>

#include "codec/sendable.h"
#include "codec/tensor_codec.h"
#include "codec/tensor_format.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kWasteFactor = 2;
constexpr size_t kSmall = 8192;     // bytes; in torch, too, small tensors keep their strides
constexpr size_t kLargestItem = 16; // bytes, of complex128

// Whether a range of a storage is much more than the tensors in it show. See Note [What of a storage travels].
bool wasteful(size_t rangeBytes, size_t shownBytes) {
  return rangeBytes >= kSmall && rangeBytes > kWasteFactor * shownBytes;
}

size_t denseBytes(const at::Tensor& tensor) {
  return static_cast<size_t>(tensor.numel()) * tensor.itemsize();
}

// One past the last byte that the tensor shows, counted from its first.
size_t spanBytes(const at::Tensor& tensor) {
  if (tensor.numel() == 0) {
    return 0;
  }
  size_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += static_cast<size_t>(tensor.size(d) - 1) * static_cast<size_t>(tensor.stride(d));
  }
  return (last + 1) * tensor.itemsize();
}

size_t firstByte(const at::Tensor& tensor) {
  return static_cast<size_t>(tensor.storage_offset()) * tensor.itemsize();
}

void check(const at::Tensor& tensor) {
  if (const auto why = whyNotSent(tensor, Place::kRequest)) {
    TORCH_CHECK(false, "A tensor among the arguments or in the result cannot be sent: ", *why);
  }
}

// The tensor to read bytes from: dense if the original wastes too much, materialised if it has no bytes at all.
at::Tensor sendable(const at::Tensor& tensor) {
  if (tensor._is_zerotensor()) {
    return at::zeros(tensor.sizes(), tensor.options());
  }
  if (wasteful(spanBytes(tensor), denseBytes(tensor))) {
    const at::NoGradGuard noGrad;
    return tensor.clone(at::MemoryFormat::Contiguous);
  }
  return tensor;
}

// Of a tensor that is not plain: what it is made of.
std::vector<at::Tensor> componentsOf(const at::Tensor& tensor) {
  const at::NoGradGuard noGrad;
  if (tensor.layout() == at::kSparse) {
    return {tensor._indices(), tensor._values()};
  }
  if (tensor.layout() == at::kSparseCsr) {
    return {tensor.crow_indices().contiguous(), tensor.col_indices().contiguous(), tensor.values()};
  }
  if (tensor.qscheme() == at::kPerTensorAffine) {
    return {tensor};
  }
  return {tensor, tensor.q_per_channel_scales().contiguous(), tensor.q_per_channel_zero_points().contiguous()};
}

uint8_t dimensionsOf(const at::Tensor& tensor) {
  TORCH_CHECK(
      tensor.dim() <= static_cast<int64_t>(kMaxDimensions), "A tensor of ", tensor.dim(), " dimensions is not sent");
  return static_cast<uint8_t>(tensor.dim());
}

} // namespace

void TensorWriter::add(const std::vector<at::Tensor>& tensors, const std::vector<c10::Device>& targets) {
  parts_.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (!tensor.defined()) {
      continue;
    }
    check(tensor);
    if (isPlain(tensor)) {
      parts_.push_back(sendable(tensor));
    } else {
      for (const at::Tensor& component : componentsOf(tensor)) {
        parts_.push_back(sendable(component));
      }
    }
    if (!targets.empty()) {
      partTargets_.resize(parts_.size(), targets[i]);
    }
  }
  addSlices();
  for (const at::Tensor& tensor : tensors) {
    describe(tensor);
  }
}

void TensorWriter::addSlices() {
  places_.reserve(parts_.size());
  for (const at::Tensor& part : parts_) {
    const size_t first = firstByte(part);
    places_.push_back({0, first, first + spanBytes(part)});
  }
  if (parts_.size() > 1) {
    groupByStorage();
  } else if (parts_.size() == 1) {
    addSlice(0, places_[0].first, places_[0].last);
  }
}

void TensorWriter::addSlice(size_t part, size_t first, size_t last) {
  const c10::Storage& storage = parts_[part].storage();
  const char* memory = last > first ? memoryOf(storage, last) + first : nullptr;
  slices_.push_back({memory, last - first});
  sliceFirst_.push_back(first);
  if (!partTargets_.empty()) {
    whereabouts_.push_back({storage.device(), partTargets_[part]});
    sliceParts_.push_back(part);
  }
}

void TensorWriter::groupByStorage() {
  struct Group {
    size_t first, last, shown, slice;
  };
  constexpr size_t kNoSlice = std::numeric_limits<size_t>::max();
  std::unordered_map<const void*, Group> groups;
  groups.reserve(parts_.size());
  for (size_t i = 0; i < parts_.size(); ++i) {
    const Place& place = places_[i];
    const size_t shown = std::min(denseBytes(parts_[i]), place.last - place.first);
    auto [found, fresh] =
        groups.try_emplace(parts_[i].storage().unsafeGetStorageImpl(), Group{place.first, place.last, shown, kNoSlice});
    if (!fresh) {
      found->second.first = std::min(found->second.first, place.first);
      found->second.last = std::max(found->second.last, place.last);
      found->second.shown += shown;
    }
  }
  for (size_t i = 0; i < parts_.size(); ++i) {
    Place& place = places_[i];
    Group& group = groups.at(parts_[i].storage().unsafeGetStorageImpl());
    group.first -= group.first % kLargestItem; // the views may be of several dtypes: each must start at a whole item
    const bool alone = wasteful(group.last - group.first, group.shown);
    if (alone || group.slice == kNoSlice) {
      const size_t first = alone ? place.first : group.first;
      const size_t last = alone ? place.last : group.last;
      group.slice = slices_.size();
      addSlice(i, first, last);
    }
    place.slice = group.slice;
  }
}

std::vector<c10::Storage> TensorWriter::storages() const {
  std::vector<c10::Storage> storages;
  std::unordered_set<const c10::StorageImpl*> known;
  for (const at::Tensor& part : parts_) {
    if (part.storage().device().is_cpu() && known.insert(part.storage().unsafeGetStorageImpl()).second) {
      storages.push_back(part.storage());
    }
  }
  return storages;
}

void TensorWriter::describe(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    put(Form::kUndefined);
  } else if (isPlain(tensor)) {
    put(Form::kPlain);
    describeNextPart(tensor.requires_grad());
  } else if (tensor.is_quantized()) {
    put(Form::kQuantized);
    describeQuantized(tensor);
  } else {
    put(tensor.layout() == at::kSparse ? Form::kSparse : Form::kSparseCsr);
    describeSparse(tensor);
  }
}

void TensorWriter::describeSparse(const at::Tensor& tensor) {
  put(static_cast<uint8_t>(tensor.requires_grad() ? kRequiresGrad : 0));
  put(dimensionsOf(tensor));
  for (const int64_t size : tensor.sizes()) {
    put(size);
  }
  const int components = tensor.layout() == at::kSparse ? 2 : 3;
  for (int i = 0; i < components; ++i) {
    describeNextPart();
  }
}

void TensorWriter::describeQuantized(const at::Tensor& tensor) {
  const at::QScheme scheme = tensor.qscheme();
  put(static_cast<uint8_t>(scheme));
  if (scheme == at::kPerTensorAffine) {
    put(tensor.q_scale());
    put(tensor.q_zero_point());
    describeNextPart();
  } else {
    put(tensor.q_per_channel_axis());
    describeNextPart();
    describeNextPart();
    describeNextPart();
  }
}

void TensorWriter::describeNextPart(bool requiresGrad) {
  const at::Tensor& part = parts_[nextPart_];
  const Place& place = places_[nextPart_++];
  uint8_t flags = 0;
  flags |= requiresGrad ? kRequiresGrad : 0;
  flags |= part.is_conj() ? kConjugated : 0;
  flags |= part.is_neg() ? kNegated : 0;
  flags |= part.is_contiguous() ? kContiguous : 0;
  put(static_cast<uint8_t>(part.scalar_type()));
  put(flags);
  put(dimensionsOf(part));
  put(static_cast<uint32_t>(place.slice));
  put(static_cast<uint64_t>((place.first - sliceFirst_[place.slice]) / part.itemsize()));
  for (const int64_t size : part.sizes()) {
    put(size);
  }
  if ((flags & kContiguous) == 0) {
    for (const int64_t stride : part.strides()) {
      put(stride);
    }
  }
}

} // namespace torch_rpc_mpi
