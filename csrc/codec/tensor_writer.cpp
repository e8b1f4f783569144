#include <limits>
#include <unordered_map>

#include <ATen/Functions.h>
#include <torch/csrc/distributed/rpc/utils.h>
#include <torch/csrc/jit/serialization/pickler.h>

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

} // namespace

void TensorWriter::add(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> sent;
  std::vector<Plain> plain;
  std::vector<size_t> pickled;
  sent.reserve(tensors.size());
  plain.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].defined()) {
      sent.emplace_back();
      continue;
    }
    check(tensors[i]);
    if (isPlain(tensors[i])) {
      sent.push_back(sendable(tensors[i]));
      plain.push_back({i, i, firstByte(sent[i]), firstByte(sent[i]) + spanBytes(sent[i])});
    } else {
      sent.push_back(tensors[i]);
      pickled.push_back(i);
    }
  }
  addPlain(sent, plain);
  size_t nextPlain = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (nextPlain < plain.size() && plain[nextPlain].index == i) {
      describe(tensors[i], sent[i], plain[nextPlain++]);
    } else {
      put(sent[i].defined() ? Form::kPickled : Form::kUndefined);
    }
  }
  if (!pickled.empty()) {
    addPickled(sent, pickled);
  }
  keptAlive_.insert(keptAlive_.end(), sent.begin(), sent.end());
}

void TensorWriter::addPlain(const std::vector<at::Tensor>& tensors, std::vector<Plain>& plain) {
  if (plain.size() > 1) {
    groupByStorage(tensors, plain);
  } else if (plain.size() == 1) {
    plain[0].group = 0;
    addSlice(tensors[plain[0].index].storage(), plain[0].first, plain[0].last);
  }
}

void TensorWriter::addSlice(const c10::Storage& storage, size_t first, size_t last) {
  const char* memory = last > first ? memoryOf(storage, last) + first : nullptr;
  slices_.push_back({memory, last - first});
  sliceFirst_.push_back(first);
}

void TensorWriter::groupByStorage(const std::vector<at::Tensor>& tensors, std::vector<Plain>& plain) {
  struct Group {
    size_t first, last, shown, slice;
  };
  constexpr size_t kNoSlice = std::numeric_limits<size_t>::max();
  std::unordered_map<const void*, Group> groups;
  groups.reserve(plain.size());
  for (const Plain& place : plain) {
    const at::Tensor& tensor = tensors[place.index];
    const size_t shown = std::min(denseBytes(tensor), place.last - place.first);
    auto [found, fresh] =
        groups.try_emplace(tensor.storage().unsafeGetStorageImpl(), Group{place.first, place.last, shown, kNoSlice});
    if (!fresh) {
      found->second.first = std::min(found->second.first, place.first);
      found->second.last = std::max(found->second.last, place.last);
      found->second.shown += shown;
    }
  }
  for (Plain& place : plain) {
    const at::Tensor& tensor = tensors[place.index];
    Group& group = groups.at(tensor.storage().unsafeGetStorageImpl());
    group.first -= group.first % kLargestItem; // the views may be of several dtypes: each must start at a whole item
    const bool alone = wasteful(group.last - group.first, group.shown);
    if (alone || group.slice == kNoSlice) {
      const size_t first = alone ? place.first : group.first;
      const size_t last = alone ? place.last : group.last;
      group.slice = slices_.size();
      addSlice(tensor.storage(), first, last);
    }
    place.group = group.slice;
  }
}

void TensorWriter::describe(const at::Tensor& original, const at::Tensor& sent, const Plain& place) {
  TORCH_CHECK(
      sent.dim() <= static_cast<int64_t>(kMaxDimensions), "A tensor of ", sent.dim(), " dimensions is not sent");
  uint8_t flags = 0;
  flags |= original.requires_grad() ? kRequiresGrad : 0;
  flags |= sent.is_conj() ? kConjugated : 0;
  flags |= sent.is_neg() ? kNegated : 0;
  flags |= sent.is_contiguous() ? kContiguous : 0;
  put(Form::kPlain);
  put(static_cast<uint8_t>(sent.scalar_type()));
  put(flags);
  put(static_cast<uint8_t>(sent.dim()));
  put(static_cast<uint32_t>(place.group));
  put(static_cast<uint64_t>((place.first - sliceFirst_[place.group]) / sent.itemsize()));
  for (const int64_t size : sent.sizes()) {
    put(size);
  }
  if ((flags & kContiguous) == 0) {
    for (const int64_t stride : sent.strides()) {
      put(stride);
    }
  }
}

void TensorWriter::addPickled(const std::vector<at::Tensor>& tensors, const std::vector<size_t>& indices) {
  std::vector<at::Tensor> chosen;
  for (const size_t index : indices) {
    chosen.push_back(tensors[index]);
  }
  std::string pickle;
  torch::jit::Pickler pickler([&](const char* data, size_t bytes) { pickle.append(data, bytes); });
  pickler.protocol();
  pickler.pushIValue(torch::distributed::rpc::cloneSparseTensors(chosen));
  pickler.stop();
  put(static_cast<uint64_t>(pickle.size()));
  put(static_cast<uint32_t>(slices_.size()));
  put(static_cast<uint32_t>(pickler.tensorData().size()));
  descriptions_ += pickle;
  for (const at::Tensor& component : pickler.tensorData()) {
    keptAlive_.push_back(component);
    addSlice(component.storage(), 0, component.storage().nbytes());
  }
}

} // namespace torch_rpc_mpi
