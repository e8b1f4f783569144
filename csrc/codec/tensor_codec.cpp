#include "codec/tensor_codec.h"

#include <limits>
#include <unordered_map>

#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/distributed/rpc/utils.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <torch/csrc/jit/serialization/unpickler.h>

#include "transfer/receive_pool.h"

namespace torch_rpc_mpi {

namespace {

enum class Form : uint8_t { kPlain = 1, kUndefined = 2, kPickled = 3 };

enum Flags : uint8_t { kRequiresGrad = 1, kConjugated = 2, kNegated = 4, kContiguous = 8 };

constexpr size_t kMaxDimensions = 64;
constexpr size_t kWasteFactor = 2;
constexpr size_t kLargestItem = 16; // bytes, of complex128

bool isPlain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && tensor.has_storage() && !tensor.is_quantized() && !tensor.is_mkldnn() &&
      !tensor.is_nested();
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

// The tensor to read bytes from: dense if the original wastes too much, materialised if it has no bytes at all.
at::Tensor sendable(const at::Tensor& tensor) {
  TORCH_CHECK(
      tensor.device().is_cpu(), "The MPI RPC backend can send CPU tensors only, but an argument or result lies on ",
      tensor.device(), ". Move it to the CPU before sending it (tensor.cpu())");
  if (tensor._is_zerotensor()) {
    return at::zeros(tensor.sizes(), tensor.options());
  }
  if (spanBytes(tensor) > kWasteFactor * denseBytes(tensor)) {
    const at::NoGradGuard noGrad;
    return tensor.clone(at::MemoryFormat::Contiguous);
  }
  return tensor;
}

} // namespace

// ---- writing ----

void TensorWriter::add(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> sent;
  std::vector<Plain> plain;
  std::vector<size_t> pickled;
  sent.reserve(tensors.size());
  plain.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].defined()) {
      sent.emplace_back();
    } else if (isPlain(tensors[i])) {
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
    const char* base = static_cast<const char*>(tensors[plain[0].index].storage().data());
    slices_.push_back({base + plain[0].first, plain[0].last - plain[0].first});
    sliceFirst_.push_back(plain[0].first);
  }
}

void TensorWriter::groupByStorage(const std::vector<at::Tensor>& tensors, std::vector<Plain>& plain) {
  struct Group {
    size_t first, last, shown, slice;
    bool wasteful() const {
      return last - first > kWasteFactor * shown;
    }
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
    const bool alone = group.wasteful();
    if (alone || group.slice == kNoSlice) {
      const size_t first = alone ? place.first : group.first;
      const size_t last = alone ? place.last : group.last;
      group.slice = slices_.size();
      slices_.push_back({static_cast<const char*>(tensor.storage().data()) + first, last - first});
      sliceFirst_.push_back(first);
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
    TORCH_CHECK(
        tensors[index].device().is_cpu(),
        "The MPI RPC backend can send CPU tensors only, but an argument or result lies on ", tensors[index].device());
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
    slices_.push_back({static_cast<const char*>(component.storage().data()), component.storage().nbytes()});
    sliceFirst_.push_back(0);
  }
}

// ---- reading ----

const char* Reader::take(size_t bytes) {
  if (bytes > left_) {
    throw BadMessage("it ends before its contents do");
  }
  const char* taken = data_;
  data_ += bytes;
  left_ -= bytes;
  return taken;
}

namespace {

struct PlainDescription {
  at::ScalarType type;
  uint8_t flags;
  uint32_t storage;
  uint64_t offset; // elements
  std::vector<int64_t> sizes, strides;
};

PlainDescription readPlain(Reader& reader) {
  PlainDescription description;
  const auto type = reader.get<uint8_t>();
  if (type >= static_cast<uint8_t>(at::ScalarType::NumOptions)) {
    throw BadMessage("a tensor has an unknown dtype");
  }
  description.type = static_cast<at::ScalarType>(type);
  description.flags = reader.get<uint8_t>();
  const size_t dimensions = reader.get<uint8_t>();
  description.storage = reader.get<uint32_t>();
  description.offset = reader.get<uint64_t>();
  if (dimensions > kMaxDimensions) {
    throw BadMessage("a tensor has too many dimensions");
  }
  description.sizes.resize(dimensions);
  for (int64_t& size : description.sizes) {
    size = reader.get<int64_t>();
  }
  description.strides.resize(dimensions);
  if ((description.flags & kContiguous) != 0) {
    int64_t stride = 1;
    for (size_t d = dimensions; d-- > 0;) {
      description.strides[d] = stride;
      if (__builtin_mul_overflow(stride, std::max<int64_t>(description.sizes[d], 1), &stride)) {
        throw BadMessage("a tensor is larger than memory can be");
      }
    }
  } else {
    for (int64_t& stride : description.strides) {
      stride = reader.get<int64_t>();
    }
  }
  return description;
}

// Throws unless every element lies within the storage.
void checkBounds(const PlainDescription& description, size_t storageBytes) {
  uint64_t last = description.offset;
  bool overflow = false;
  bool empty = false;
  for (size_t d = 0; d < description.sizes.size(); ++d) {
    const int64_t size = description.sizes[d];
    const int64_t stride = description.strides[d];
    empty |= size == 0;
    overflow |= size < 0 || stride < 0;
    uint64_t reach = 0;
    overflow |= __builtin_mul_overflow(
        static_cast<uint64_t>(std::max<int64_t>(size - 1, 0)), static_cast<uint64_t>(stride), &reach);
    overflow |= __builtin_add_overflow(last, reach, &last);
  }
  uint64_t end = 0;
  overflow |= __builtin_add_overflow(last, uint64_t{1}, &end);
  overflow |= __builtin_mul_overflow(end, static_cast<uint64_t>(c10::elementSize(description.type)), &end);
  if (overflow || (!empty && end > storageBytes)) {
    throw BadMessage("a tensor reaches beyond its storage");
  }
}

at::Tensor build(const PlainDescription& description, const c10::Storage& storage) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(description.type));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(
      description.sizes, description.strides, static_cast<int64_t>(description.offset));
  if ((description.flags & kConjugated) != 0) {
    tensor._set_conj(true);
  }
  if ((description.flags & kNegated) != 0) {
    tensor._set_neg(true);
  }
  if ((description.flags & kRequiresGrad) != 0) {
    tensor.set_requires_grad(true);
  }
  return tensor;
}

std::vector<at::Tensor> unpickle(Reader& reader, std::vector<at::DataPtr>& storages) {
  const auto bytes = reader.get<uint64_t>();
  const size_t first = reader.get<uint32_t>();
  const size_t count = reader.get<uint32_t>();
  if (first + count > storages.size()) {
    throw BadMessage("a pickled tensor has no storage");
  }
  const char* at = reader.take(bytes);
  const char* end = at + bytes;
  torch::jit::Unpickler unpickler(
      [&](char* into, size_t wanted) -> size_t {
        const size_t given = std::min(wanted, static_cast<size_t>(end - at));
        std::memcpy(into, at, given);
        at += given;
        return given;
      },
      nullptr, nullptr,
      [&](const std::string& name) -> at::DataPtr {
        const size_t index = std::stoul(name);
        TORCH_CHECK(index < count, "a pickled tensor has no storage");
        return std::move(storages[first + index]);
      },
      {});
  std::vector<at::Tensor> tensors;
  for (auto&& tensor : unpickler.parse_ivalue().toTensorList()) {
    tensors.emplace_back(std::move(tensor));
  }
  return tensors;
}

} // namespace

std::vector<at::Tensor> readTensors(
    Reader& reader,
    size_t count,
    std::vector<at::DataPtr> dataPtrs,
    const std::vector<size_t>& sizes) {
  // A description takes a byte at least: a count beyond that is a lie that would allocate gigabytes.
  if (count > reader.left()) {
    throw BadMessage("it announces more tensors than it describes");
  }
  std::vector<at::Tensor> tensors(count);
  std::vector<c10::Storage> storages(dataPtrs.size());
  std::vector<size_t> pickled;
  for (size_t i = 0; i < count; ++i) {
    const auto form = reader.get<Form>();
    if (form == Form::kPickled) {
      pickled.push_back(i);
    } else if (form == Form::kPlain) {
      const PlainDescription description = readPlain(reader);
      const size_t index = description.storage;
      if (index >= storages.size()) {
        throw BadMessage("a tensor has no storage");
      }
      checkBounds(description, sizes[index]);
      if (!storages[index]) {
        // Resizable, as the storage of any tensor that a user makes.
        storages[index] = c10::make_intrusive<c10::StorageImpl>(
            c10::StorageImpl::use_byte_size_t(), sizes[index], std::move(dataPtrs[index]), c10::GetCPUAllocator(),
            /*resizable=*/true);
      }
      tensors[i] = build(description, storages[index]);
    } else if (form != Form::kUndefined) {
      throw BadMessage("a tensor has an unknown form");
    }
  }
  if (!pickled.empty()) {
    std::vector<at::Tensor> unpickled = unpickle(reader, dataPtrs);
    if (unpickled.size() != pickled.size()) {
      throw BadMessage("pickled tensors are missing");
    }
    for (size_t i = 0; i < pickled.size(); ++i) {
      tensors[pickled[i]] = std::move(unpickled[i]);
    }
  }
  return tensors;
}

at::DataPtr allocateStorage(size_t bytes, bool large) {
  if (!large) {
    return c10::GetCPUAllocator()->allocate(bytes);
  }
  struct Block {
    void* data;
    size_t bytes;
  };
  auto block = std::make_unique<Block>(Block{ReceivePool::instance().allocate(bytes), bytes});
  void* data = block->data;
  return {
      data, block.release(),
      [](void* context) {
        const std::unique_ptr<Block> owned(static_cast<Block*>(context));
        ReceivePool::instance().release(owned->data, owned->bytes);
      },
      c10::Device(c10::kCPU)};
}

} // namespace torch_rpc_mpi
