// Tensors as descriptions and slices of storage, and back.
//
// Note [What of a storage travels]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A tensor's slice is the range of its storage between its first and its last element, sent from where it lies. When
// that range is large and more than twice what the tensor shows, a dense copy is sent instead, so that a view of a much
// larger storage takes only what it shows (torch draws the same lines). Tensors of one message that share a storage
// share one slice and still share at the receiver, unless the slice would be that wasteful. What is not a plain strided
// tensor (sparse, quantized) is described by the plain ones that it is made of.
//
// Note [What is read of a message]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Nothing beyond what arrived, whatever the message says, neither while it is decoded nor by operators that use its
// tensors later: each length is compared with what is left, each tensor with its storage, and of sparse and quantized
// tensors also what indices and channels say, since operators rely on that. torch's unpickler does not serve for this:
// it makes storages of whatever size is announced.
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
inline void require(bool holds, const char* otherwise) {
  if (!holds) {
    throw BadMessage(otherwise);
  }
}

// The sender's side. Holds on to the memory of the slices.
class TensorWriter {
 public:
  // Once. Throws c10::Error for tensors that cannot be sent. targets: the devices of the tensors at the receiver, where
  // one of them is or will be on one; then the copies that this makes lie in the current streams.
  void add(const std::vector<at::Tensor>& tensors, const std::vector<c10::Device>& targets = {});

  const std::vector<ConstSpan>& slices() const {
    return slices_;
  }
  const std::string& descriptions() const {
    return descriptions_;
  }
  // Where a slice is, and where it is to be. With targets.
  struct Whereabouts {
    c10::Device here;
    c10::Device there;
  };
  const std::vector<Whereabouts>& whereabouts() const {
    return whereabouts_;
  }
  // The memory that it lies in.
  const c10::Storage& storageOf(size_t slice) const {
    return parts_[sliceParts_[slice]].storage();
  }
  const std::vector<at::Tensor>& parts() const {
    return parts_;
  }
  // Those of the host in which slices lie, each once.
  std::vector<c10::Storage> storages() const;

 private:
  // Of a part in its storage.
  struct Place {
    size_t slice; // index of what travels of the storage
    size_t first; // bytes into it
    size_t last;  // one past
  };
  void addSlices();
  void addSlice(size_t part, size_t first, size_t last);
  void groupByStorage();
  void describe(const at::Tensor& tensor);
  void describeSparse(const at::Tensor& tensor);
  void describeQuantized(const at::Tensor& tensor);
  void describeNextPart(bool requiresGrad = false);
  template <class T>
  void put(T value) {
    descriptions_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }

  // What travels of the tensors, in order: of a plain one itself or a dense copy of it, of others what they are made
  // of.
  std::vector<at::Tensor> parts_;
  std::vector<Place> places_; // of the parts
  size_t nextPart_ = 0;       // to be described
  std::vector<ConstSpan> slices_;
  std::vector<size_t> sliceFirst_; // where each slice begins in its storage
  std::vector<c10::Device> partTargets_;
  std::vector<Whereabouts> whereabouts_; // of the slices
  std::vector<size_t> sliceParts_;       // for each of them, one that lies in it
  std::string descriptions_;
};

// A bounds-checked cursor over received bytes. `what` they are: for the texts of errors.
class Reader {
 public:
  Reader(ConstSpan bytes, const char* what) : data_(bytes.data), left_(bytes.bytes), whole_(bytes.bytes), what_(what) {}
  const char* take(size_t bytes);
  // Throws unless everything was read.
  void end() const;
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
  const size_t whole_;
  const char* const what_;
};

// The receiver's side: rebuilds `count` tensors over storages that have arrived. `sizes` are the storages' bytes.
// Throws BadMessage, std::invalid_argument.
std::vector<at::Tensor> readTensors(
    Reader& descriptions,
    size_t count,
    std::vector<at::DataPtr> storages,
    const std::vector<size_t>& sizes);

// Memory for a storage of so many bytes: from the receive pool when large, from torch's allocator otherwise.
at::DataPtr allocateStorage(size_t bytes, bool large);
// Whether it is from one of these, and so nobody's but the storage's.
bool isOfStorageAlone(const at::DataPtr& memory);

} // namespace torch_rpc_mpi
