// Tensors as descriptions and slices of storage, and back.
//
// Note [What of a storage travels]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A tensor's slice is the range of its storage between its first and its last element, sent from where it lies. When
// that range is large and more than twice what the tensor shows, a dense copy is sent instead, so that a view of a much
// larger storage takes only what it shows (torch draws the same lines). Tensors of one message that share a storage
// share one slice and still share at the receiver, unless the slice would be that wasteful. What is not a plain strided
// tensor (sparse, quantized) is described by torch's own pickler; its component storages travel as slices like the
// others.
#pragma once

#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "peer/frame.h"

namespace torch_rpc_mpi {

// What arrived makes no sense as a message; what() says why.
class BadMessage : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The sender's side. Holds on to what it has to keep alive (copies it made).
class TensorWriter {
 public:
  // Throws c10::Error for tensors that cannot be sent, naming the tensor.
  void add(const std::vector<at::Tensor>& tensors);

  const std::vector<ConstSpan>& slices() const {
    return slices_;
  }
  const std::string& descriptions() const {
    return descriptions_;
  }

 private:
  struct Plain {
    size_t index; // in the message
    size_t group; // which slice
    size_t first; // bytes into its storage
    size_t last;  // one past
  };
  void addPlain(const std::vector<at::Tensor>& tensors, std::vector<Plain>& plain);
  void addSlice(const c10::Storage& storage, size_t first, size_t last);
  void addPickled(const std::vector<at::Tensor>& tensors, const std::vector<size_t>& indices);
  void groupByStorage(const std::vector<at::Tensor>& tensors, std::vector<Plain>& plain);
  void describe(const at::Tensor& original, const at::Tensor& sent, const Plain& place);
  template <class T>
  void put(T value) {
    descriptions_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }

  std::vector<ConstSpan> slices_;
  std::vector<size_t> sliceFirst_; // where each slice begins in its storage
  std::string descriptions_;
  std::vector<at::Tensor> keptAlive_;
};

// A bounds-checked cursor over received bytes.
class Reader {
 public:
  explicit Reader(ConstSpan bytes) : data_(bytes.data), left_(bytes.bytes) {}
  const char* take(size_t bytes);
  template <class T>
  T get() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  size_t left() const {
    return left_;
  }

 private:
  const char* data_;
  size_t left_;
};

// The receiver's side: rebuilds `count` tensors over storages that have arrived. `sizes` are the storages' bytes.
std::vector<at::Tensor> readTensors(
    Reader& descriptions,
    size_t count,
    std::vector<at::DataPtr> storages,
    const std::vector<size_t>& sizes);

// Memory for a storage of so many bytes: from the receive pool when large, from torch's allocator otherwise.
at::DataPtr allocateStorage(size_t bytes, bool large);

} // namespace torch_rpc_mpi
