#include "codec/receive_target.h"

#include <algorithm>
#include <new>

#include "base/error_text.h"
#include "host/no_memory.h"
#include "host/resources.h"

namespace torch_rpc_mpi {

namespace {

// What is inside the body has to be there, and nothing else: a body that announces other parts than its frame does, or
// was cut, must not be told apart only when what follows it has been received to the wrong places.
void checkInside(const Outline& outline, uint64_t left) {
  require(outline.head.payloadInBulk <= 1 && outline.head.placed <= 1, "its head is none");
  const auto take = [&left](uint64_t bytes) {
    require(bytes <= left, "it ends early");
    left -= bytes;
  };
  if (outline.head.payloadInBulk == 0) {
    take(outline.head.payloadBytes);
  }
  for (size_t i = 0; i < outline.sizes.size(); ++i) {
    if (outline.inside[i]) {
      take(outline.sizes[i]);
    }
  }
  require(left == 0, "it is longer than it says");
}

// It is filled with zeros: of more than there is, that would end the process.
std::vector<char> payloadOf(size_t bytes) {
  constexpr const char* kWhat = "the payload of a message";
  if (bytes > size_t{1} << 30 && bytes > usableMemory()) {
    throw NoMemory(kWhat, bytes);
  }
  try {
    return std::vector<char>(bytes);
  } catch (const std::bad_alloc&) {
    throw NoMemory(kWhat, bytes);
  }
}

} // namespace

void ReceiveTarget::abandon() noexcept {
  for (size_t i = 0; i < storages.size(); ++i) {
    if (!storages[i].device().is_cpu() && !sinks[sinks.size() - storages.size() + i]->keepsMemory()) {
      storages[i].clear();
    }
  }
}

void ReceiveTarget::add(size_t bytes, int device, size_t piece) {
  at::DataPtr memory;
  std::unique_ptr<ChunkSink> sink;
  try {
    if (device < 0) {
      memory = allocateStorage(bytes, /*large=*/true);
    } else {
      memory = slices->allocate(slices->device(device), bytes);
    }
  } catch (const std::bad_alloc& failure) {
    if (slices == nullptr) {
      throw;
    }
    error = errorText(failure);
  }
  auto* const data = static_cast<char*>(memory.get());
  if (device >= 0) {
    sink = slices->sinkFor(slices->device(device), data, bytes, piece);
  }
  storages.push_back(std::move(memory));
  storageBytes.push_back(bytes);
  parts.push_back({data, bytes});
  if (slices != nullptr) {
    sinks.push_back(std::move(sink));
  }
}

std::unique_ptr<InboundSlices> slicesFor(const Outline& outline, const std::shared_ptr<Devices>& devices, int source) {
  if (std::ranges::all_of(outline.places, [](const SlicePlace& place) { return place.device < 0; })) {
    require(outline.tickets.empty(), "it lends device memory for tensors of the host");
    return nullptr;
  }
  require(devices != nullptr, "its tensors are for devices, of which this worker uses none");
  auto slices = std::make_unique<InboundSlices>(devices, source);
  for (const Ticket& ticket : outline.tickets) {
    slices->borrow(ticket);
  }
  return slices;
}

std::unique_ptr<BulkTarget> makeReceiveTarget(ConstSpan body, const std::shared_ptr<Devices>& devices, int source) {
  Reader reader(body, "the body");
  const Outline outline = readOutline(reader);
  checkInside(outline, reader.left());
  auto target = std::make_unique<ReceiveTarget>();
  if (outline.head.payloadInBulk != 0) {
    try {
      target->payload = payloadOf(outline.head.payloadBytes);
    } catch (const NoMemory& failure) {
      if (outline.places.empty()) {
        throw;
      }
      target->error = failure.what(); // as in add()
    }
    target->parts.push_back({target->payload.empty() ? nullptr : target->payload.data(), outline.head.payloadBytes});
  }
  target->slices = slicesFor(outline, devices, source);
  target->sinks.resize(target->slices == nullptr ? 0 : target->parts.size());
  for (size_t i = 0; i < outline.sizes.size(); ++i) {
    if (outline.isBulk(i)) {
      const bool onHost = outline.onHost(i);
      const bool tickets = !onHost && outline.places[i].ticket == kTicketsFollow;
      require(!tickets || outline.places[i].offset > 0, "it lends nothing");
      require(onHost || outline.sizes[i] > 0, "a part for a device is empty");
      target->add(outline.sizes[i], onHost ? -1 : outline.places[i].device, tickets ? outline.places[i].offset : 0);
    }
  }
  return target;
}

} // namespace torch_rpc_mpi
