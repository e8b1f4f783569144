#include <ATen/Functions.h>
#include <ATen/quantized/QTensorImpl.h>
#include <ATen/quantized/Quantizer.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/TensorOptions.h>

#include "codec/sendable.h"
#include "codec/sparse_indices.h"
#include "codec/tensor_codec.h"
#include "codec/tensor_format.h"
#include "peer/receive_pool.h"

namespace torch_rpc_mpi {

const char* Reader::take(size_t bytes) {
  if (bytes > left_) {
    throw BadMessage(
        c10::str(
            "it ends early: ", what_, " has ", whole_, " bytes, of which ", left_, " are left where ", bytes,
            " more are announced"));
  }
  const char* taken = data_;
  data_ += bytes;
  left_ -= bytes;
  return taken;
}

void Reader::end() const {
  if (left_ > 0) {
    throw BadMessage(c10::str(what_, " has ", whole_, " bytes, of which ", left_, " belong to nothing"));
  }
}

namespace {

struct Description {
  at::ScalarType type;
  uint8_t flags;
  uint32_t storage;
  uint64_t offset; // elements
  std::vector<int64_t> sizes, strides;
};

at::ScalarType readType(Reader& reader) {
  const auto number = reader.get<uint8_t>();
  const auto type = static_cast<at::ScalarType>(number);
  require(
      number < static_cast<uint8_t>(at::ScalarType::NumOptions) && type != at::ScalarType::Undefined,
      "a tensor has an unknown dtype");
  return type;
}

// torch multiplies all of them, also where one is 0.
void checkCount(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    require(size >= 0, "a tensor has a negative size");
    require(!__builtin_mul_overflow(count, size, &count), "a tensor has more elements than can be counted");
  }
}

std::vector<int64_t> readSizes(Reader& reader) {
  const size_t dimensions = reader.get<uint8_t>();
  require(dimensions <= kMaxDimensions, "a tensor has too many dimensions");
  std::vector<int64_t> sizes(dimensions);
  for (int64_t& size : sizes) {
    size = reader.get<int64_t>();
  }
  checkCount(sizes);
  return sizes;
}

Description readDescription(Reader& reader) {
  Description description;
  description.type = readType(reader);
  description.flags = reader.get<uint8_t>();
  const size_t dimensions = reader.get<uint8_t>();
  description.storage = reader.get<uint32_t>();
  description.offset = reader.get<uint64_t>();
  require(dimensions <= kMaxDimensions, "a tensor has too many dimensions");
  description.sizes.resize(dimensions);
  for (int64_t& size : description.sizes) {
    size = reader.get<int64_t>();
  }
  description.strides.resize(dimensions);
  if ((description.flags & kContiguous) != 0) {
    int64_t stride = 1;
    for (size_t d = dimensions; d-- > 0;) {
      description.strides[d] = stride;
      require(
          !__builtin_mul_overflow(stride, std::max<int64_t>(description.sizes[d], 1), &stride),
          "a tensor is larger than memory can be");
    }
  } else {
    for (int64_t& stride : description.strides) {
      stride = reader.get<int64_t>();
    }
  }
  return description;
}

// Throws unless every element lies within the storage.
void checkBounds(const Description& description, size_t storageBytes) {
  checkCount(description.sizes);
  uint64_t last = description.offset;
  bool overflow = false;
  bool empty = false;
  for (size_t d = 0; d < description.sizes.size(); ++d) {
    const int64_t size = description.sizes[d];
    const int64_t stride = description.strides[d];
    empty |= size == 0;
    overflow |= stride < 0;
    uint64_t reach = 0;
    overflow |= __builtin_mul_overflow(
        static_cast<uint64_t>(std::max<int64_t>(size - 1, 0)), static_cast<uint64_t>(stride), &reach);
    overflow |= __builtin_add_overflow(last, reach, &last);
  }
  uint64_t end = 0;
  overflow |= __builtin_add_overflow(last, uint64_t{1}, &end);
  overflow |= __builtin_mul_overflow(end, static_cast<uint64_t>(c10::elementSize(description.type)), &end);
  require(!overflow && (empty || end <= storageBytes), "a tensor reaches beyond its storage");
}

// The tensors of a message, over its storages.
class TensorReader {
 public:
  TensorReader(Reader& reader, std::vector<at::DataPtr> memory, const std::vector<size_t>& sizes)
      : reader_(reader),
        memory_(std::move(memory)),
        sizes_(sizes),
        storages_(sizes.size()) {}

  at::Tensor read() {
    switch (reader_.get<Form>()) {
      case Form::kUndefined:
        return {};
      case Form::kPlain:
        return readPlain();
      case Form::kSparse:
        return readSparse();
      case Form::kSparseCsr:
        return readSparseCsr();
      case Form::kQuantized:
        return readQuantized();
      default:
        throw BadMessage("a tensor has an unknown form");
    }
  }

 private:
  // Of the memory that a description names, if it reaches no further.
  const c10::Storage& storageOf(const Description& description) {
    const size_t index = description.storage;
    require(index < storages_.size(), "a tensor has no storage");
    checkBounds(description, sizes_[index]);
    if (!storages_[index]) {
      // Resizable, as the storage of any tensor that a user makes.
      const auto device = memory_[index].device().type();
      storages_[index] = c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), sizes_[index], std::move(memory_[index]), c10::GetAllocator(device),
          /*resizable=*/true);
    }
    return storages_[index];
  }

  at::Tensor readPlain() {
    const Description description = readDescription(reader_);
    require(!at::isQIntType(description.type), "a tensor of a quantized dtype says nothing of how it is quantized");
    c10::Storage storage = storageOf(description);
    const c10::Device device = storage.device();
    const auto key =
        device.is_cpu() ? c10::DispatchKey::CPU : c10::computeDispatchKey(std::nullopt, std::nullopt, device);
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(key), c10::scalarTypeToTypeMeta(description.type));
    setShape(tensor, description);
    if ((description.flags & kConjugated) != 0) {
      require(at::isComplexType(description.type), "a tensor of a real dtype is conjugated");
      tensor._set_conj(true);
    }
    if ((description.flags & kNegated) != 0) {
      tensor._set_neg(true);
    }
    return withGrad(tensor, description.flags);
  }

  static at::Tensor withGrad(const at::Tensor& tensor, uint8_t flags) {
    if ((flags & kRequiresGrad) == 0) {
      return tensor;
    }
    require(
        at::isFloatingType(tensor.scalar_type()) || at::isComplexType(tensor.scalar_type()),
        "a tensor requires a gradient that its dtype cannot have");
    return tensor.set_requires_grad(true);
  }

  static void setShape(const at::Tensor& tensor, const Description& description) {
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(
        description.sizes, description.strides, static_cast<int64_t>(description.offset));
  }

  at::Tensor readSparse() {
    const auto flags = reader_.get<uint8_t>();
    const std::vector<int64_t> sizes = readSizes(reader_);
    const at::Tensor indices = readPlain();
    const at::Tensor values = readPlain();
    checkSparse(indices, values, sizes);
    auto tensor = at::_sparse_coo_tensor_unsafe(indices, values, sizes, values.options().layout(at::kSparse));
    return withGrad(tensor, flags);
  }

  at::Tensor readSparseCsr() {
    const auto flags = reader_.get<uint8_t>();
    const std::vector<int64_t> sizes = readSizes(reader_);
    const at::Tensor rows = readPlain();
    const at::Tensor columns = readPlain();
    const at::Tensor values = readPlain();
    checkSparseCsr(rows, columns, values, sizes);
    auto tensor = at::_sparse_csr_tensor_unsafe(rows, columns, values, sizes, values.options().layout(at::kSparseCsr));
    return withGrad(tensor, flags);
  }

  at::Tensor readQuantized() {
    const auto scheme = static_cast<at::QScheme>(reader_.get<uint8_t>());
    if (scheme == at::kPerTensorAffine) {
      const auto scale = reader_.get<double>();
      const auto zeroPoint = reader_.get<int64_t>();
      const Description description = readDescription(reader_);
      return quantized(
          description, c10::make_intrusive<at::PerTensorAffineQuantizer>(description.type, scale, zeroPoint));
    }
    const bool isFloat = scheme == at::kPerChannelAffineFloatQParams;
    require(isFloat || scheme == at::kPerChannelAffine, "a tensor is quantized by an unknown scheme");
    const auto axis = reader_.get<int64_t>();
    const Description description = readDescription(reader_);
    const at::Tensor scales = readPlain();
    const at::Tensor zeroPoints = readPlain();
    require(
        axis >= 0 && axis < static_cast<int64_t>(description.sizes.size()), "the channels of a tensor have no axis");
    for (const at::Tensor& each : {scales, zeroPoints}) {
      require(
          each.dim() == 1 && each.size(0) == description.sizes[axis] && each.is_contiguous() && !each.requires_grad(),
          "a tensor has not as many scales and zero points as channels");
    }
    if (isFloat) {
      require(
          scales.scalar_type() == at::kFloat && zeroPoints.scalar_type() == at::kFloat,
          "scales or zero points have another dtype than float");
      return quantized(
          description,
          c10::make_intrusive<at::PerChannelAffineFloatQParamsQuantizer>(description.type, scales, zeroPoints, axis));
    }
    require(
        scales.scalar_type() == at::kDouble && zeroPoints.scalar_type() == at::kLong,
        "scales have another dtype than double, or zero points another than int64");
    return quantized(
        description, c10::make_intrusive<at::PerChannelAffineQuantizer>(description.type, scales, zeroPoints, axis));
  }

  at::Tensor quantized(const Description& description, at::QuantizerPtr quantizer) {
    require(
        at::isQIntType(description.type) && !isSubByte(description.type),
        "a quantized tensor has a dtype that is not quantized");
    c10::Storage storage = storageOf(description);
    require(storage.device().is_cpu(), "a quantized tensor is on a device");
    auto tensor = at::detail::make_tensor<at::QTensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::QuantizedCPU),
        c10::scalarTypeToTypeMeta(description.type), std::move(quantizer));
    setShape(tensor, description);
    return tensor;
  }

  Reader& reader_;
  std::vector<at::DataPtr> memory_;
  const std::vector<size_t>& sizes_;   // bytes
  std::vector<c10::Storage> storages_; // those that tensors have so far
};

} // namespace

std::vector<at::Tensor> readTensors(
    Reader& reader,
    size_t count,
    std::vector<at::DataPtr> storages,
    const std::vector<size_t>& sizes) {
  // A description takes a byte at least: a count beyond that is a lie that would allocate gigabytes.
  require(count <= reader.left(), "it announces more tensors than it describes");
  TensorReader tensorReader(reader, std::move(storages), sizes);
  std::vector<at::Tensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    tensors.push_back(tensorReader.read());
  }
  reader.end();
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
  auto block = std::make_unique<Block>(Block{nullptr, bytes});
  void* data = block->data = ReceivePool::instance().allocate(bytes);
  return {
      data, block.release(),
      [](void* context) {
        const std::unique_ptr<Block> owned(static_cast<Block*>(context));
        ReceivePool::instance().release(owned->data, owned->bytes);
      },
      c10::Device(c10::kCPU)};
}

} // namespace torch_rpc_mpi
