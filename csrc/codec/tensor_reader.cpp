#include <c10/core/CPUAllocator.h>
#include <torch/csrc/jit/serialization/unpickler.h>

#include "codec/tensor_codec.h"
#include "codec/tensor_format.h"
#include "peer/receive_pool.h"

namespace torch_rpc_mpi {

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
