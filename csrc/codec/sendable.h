// Which tensors can be sent.
#pragma once

#include <optional>
#include <string>

#include <ATen/core/Tensor.h>

namespace torch_rpc_mpi {

// torch itself asks the tensors of a result, but not those of a request, for their storages.
enum class Place { kRequest, kResult };

// Why `tensor` cannot be sent, and what to send instead; nothing for what can be. A few ns for an ordinary tensor.
std::optional<std::string> whyNotSent(const at::Tensor& tensor, Place place);

// Whether a tensor is described by its sizes and strides over a storage, as most are.
bool isPlain(const at::Tensor& tensor);

// Whether several elements share a byte, which torch's functions for quantized tensors do not expect everywhere.
bool isSubByte(at::ScalarType type);

// A tensor of all bytes of a storage, without a copy: how a storage travels.
at::Tensor bytesOf(c10::Storage storage);

// Where the bytes of a storage are. Throws c10::Error where there are fewer than `bytes`, or none at all: nothing may
// be read then. See whyNotSent() for tensors of which that is known beforehand.
const char* memoryOf(const c10::Storage& storage, size_t bytes);

} // namespace torch_rpc_mpi
