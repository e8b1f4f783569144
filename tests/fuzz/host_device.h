// Devices whose memory is the host's, and whose streams are done at once, or when they are asked again.
#pragma once

#include <memory>
#include <vector>

#include <ATen/core/TensorBody.h>

#include "device/devices.h"

namespace torch_rpc_mpi::fuzz {

constexpr auto kDeviceType = c10::kPrivateUse1;
constexpr int kDevices = 2;
constexpr size_t kDeviceChunk = 1024; // bytes, of what goes through pinned memory

// Neighbours, by rank, may lend memory to this process and borrow from it; what they lend can be opened and read,
// whatever they say of it. From one to the next all begins anew.
std::shared_ptr<Devices> makeDevices(int neighbours);
size_t deviceAllocations(); // that are alive, of tensors and of what is lent; not of pinned memory, where MPI may write

at::Tensor deviceTensor(c10::DeviceIndex device, size_t bytes);
void readAll(const at::Tensor& tensor); // also one of a device, which has no operators

} // namespace torch_rpc_mpi::fuzz
