#include "codec/sparse_indices.h"

#include <algorithm>
#include <stdexcept>

#include "codec/tensor_codec.h"

namespace torch_rpc_mpi {

namespace {

// A user can make such a tensor: torch looks at indices only if asked to.
void requireIndices(bool valid) {
  if (!valid) {
    throw std::invalid_argument(
        "a sparse tensor has an index that is beyond its size. Make it with check_invariants=True to learn where");
  }
}

// The sizes of the values behind the dimensions that indices stand for are those of the whole.
void checkDenseSizes(const at::Tensor& values, int64_t behind, c10::IntArrayRef dense) {
  require(values.sizes().slice(behind) == dense, "the values of a sparse tensor have other sizes than it has");
}

bool areIndices(const at::Tensor& tensor) {
  return !tensor.is_neg() && !tensor.requires_grad();
}

// torch makes no sparse tensor of others: it resolves these first, which not every dtype lets it do.
bool areValues(const at::Tensor& tensor) {
  return !tensor.is_neg() && !tensor.is_conj() && !tensor.requires_grad();
}

// Of one matrix: rows + 1 places in the columns' indices, which do not go back, and of these only what there is.
template <typename Index>
void checkCompressed(const Index* rows, int64_t rowCount, const Index* columns, int64_t columnCount, int64_t nonZeros) {
  bool valid = rows[0] == 0 && rows[rowCount] == nonZeros;
  for (int64_t row = 0; row < rowCount; ++row) {
    valid &= rows[row] <= rows[row + 1];
  }
  for (int64_t i = 0; i < nonZeros; ++i) {
    valid &= columns[i] >= 0 && columns[i] < columnCount;
  }
  requireIndices(valid);
}

} // namespace

void checkSparse(const at::Tensor& indices, const at::Tensor& values, c10::IntArrayRef sizes) {
  require(
      indices.scalar_type() == at::kLong && indices.dim() == 2 && areIndices(indices) && values.dim() > 0 &&
          areValues(values) && indices.size(1) == values.size(0),
      "the indices of a sparse tensor do not fit its values");
  require(indices.device() == values.device(), "the indices of a sparse tensor are not where its values are");
  const int64_t dimensions = indices.size(0);
  require(dimensions <= static_cast<int64_t>(sizes.size()), "a sparse tensor has more indices than dimensions");
  checkDenseSizes(values, 1, sizes.slice(dimensions));
  if (!indices.is_cpu()) {
    return; // to look at them would take a wait for the device. Its operators check them, or are its own to blame
  }
  const auto* data = indices.const_data_ptr<int64_t>();
  // An index that is there once can stand for any number: no more are looked at than have memory.
  const int64_t different = indices.stride(1) == 0 ? std::min<int64_t>(indices.size(1), 1) : indices.size(1);
  for (int64_t d = 0; d < dimensions; ++d) {
    for (int64_t i = 0; i < different; ++i) {
      const int64_t index = data[d * indices.stride(0) + i * indices.stride(1)];
      requireIndices(index >= 0 && index < sizes[d]);
    }
  }
}

void checkSparseCsr(
    const at::Tensor& rows,
    const at::Tensor& columns,
    const at::Tensor& values,
    c10::IntArrayRef sizes) {
  const auto dimensions = static_cast<int64_t>(sizes.size());
  const int64_t batchDimensions = rows.dim() - 1;
  require(
      batchDimensions >= 0 && dimensions >= batchDimensions + 2 && columns.dim() == rows.dim() &&
          values.dim() == dimensions - 1 && rows.scalar_type() == columns.scalar_type() && areIndices(rows) &&
          areIndices(columns) && rows.is_contiguous() && columns.is_contiguous() && areValues(values),
      "the indices of a sparse tensor do not fit its values");
  const auto batch = sizes.slice(0, batchDimensions);
  const int64_t rowCount = sizes[batchDimensions];
  const int64_t columnCount = sizes[batchDimensions + 1];
  const int64_t nonZeros = columns.size(-1);
  require(
      rows.sizes().slice(0, batchDimensions) == batch && columns.sizes().slice(0, batchDimensions) == batch &&
          values.sizes().slice(0, batchDimensions) == batch && rows.size(-1) - 1 == rowCount &&
          values.size(batchDimensions) == nonZeros,
      "the indices of a sparse tensor do not fit its values");
  checkDenseSizes(values, batchDimensions + 1, sizes.slice(batchDimensions + 2));
  require(
      rows.device() == values.device() && columns.device() == values.device(),
      "the indices of a sparse tensor are not where its values are");
  if (!rows.is_cpu()) {
    return; // likewise
  }
  const int64_t matrices = rows.numel() / (rowCount + 1);
  const auto check = [&](auto* firstRow, auto* firstColumn) {
    for (int64_t i = 0; i < matrices; ++i) {
      checkCompressed(firstRow + i * (rowCount + 1), rowCount, firstColumn + i * nonZeros, columnCount, nonZeros);
    }
  };
  if (rows.scalar_type() == at::kLong) {
    check(rows.const_data_ptr<int64_t>(), columns.const_data_ptr<int64_t>());
  } else {
    require(rows.scalar_type() == at::kInt, "the indices of a sparse tensor are no integers");
    check(rows.const_data_ptr<int32_t>(), columns.const_data_ptr<int32_t>());
  }
}

} // namespace torch_rpc_mpi
