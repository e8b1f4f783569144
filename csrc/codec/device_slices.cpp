#include "codec/device_slices.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "codec/device_chunks.h"
#include "codec/direct_chunks.h"

namespace torch_rpc_mpi {

namespace {

// Bytes. Two processes on one GPU take turns of 137 us on it (on an H200), which copies of less from and to pinned
// memory do not wait for: of 64 KiB there and back they take 0.13 ms, lent memory 0.37 ms, of 1 MiB 0.55 and 0.37 ms.
constexpr size_t kWorthLending = size_t{256} << 10;

// Of a tensor, what its memory is: itself, or the components of a sparse one.
template <typename Look>
void forEachStorage(const at::Tensor& tensor, const Look& look) {
  if (!tensor.defined()) {
    return;
  }
  if (tensor.layout() == at::kSparse) {
    look(tensor._indices());
    look(tensor._values());
  } else if (tensor.layout() == at::kSparseCsr) {
    look(tensor.crow_indices());
    look(tensor.col_indices());
    look(tensor.values());
  } else {
    look(tensor);
  }
}

} // namespace

const c10::Stream& streamOf(const Streams& streams, c10::Device device) {
  const auto found = std::ranges::find_if(streams, [&](const c10::Stream& each) { return each.device() == device; });
  TORCH_INTERNAL_ASSERT(found != streams.end(), "no stream for ", device);
  return *found;
}

bool anyOnDevice(const std::vector<at::Tensor>& tensors, const std::vector<c10::Device>& targets) {
  return std::ranges::any_of(targets, [](c10::Device device) { return !device.is_cpu(); }) ||
      std::ranges::any_of(tensors, [](const at::Tensor& each) {
           return each.defined() && !each.device().is_cpu() && !each.is_meta();
         });
}

OutboundSlices::OutboundSlices(
    std::shared_ptr<Devices> devices,
    const std::vector<at::Tensor>& tensors,
    std::vector<c10::Device> targets,
    int peer,
    bool inCurrent)
    : devices_(std::move(devices)),
      targets_(std::move(targets)),
      peer_(peer),
      inCurrent_(inCurrent) {
  const auto streamFor = [&](c10::Device device) -> const c10::Stream& {
    const auto found = std::ranges::find_if(streams_, [&](const c10::Stream& each) { return each.device() == device; });
    if (found != streams_.end()) {
      return *found;
    }
    const c10::Stream current = devices_->currentStream(device);
    streams_.push_back(inCurrent ? current : devices_->poolStream(device));
    devices_->order(current, streams_.back());
    return streams_.back();
  };
  for (const at::Tensor& tensor : tensors) {
    if (tensor.defined() && !tensor.device().is_cpu() && !tensor.is_meta()) {
      forEachStorage(tensor, [&](const at::Tensor& part) {
        devices_->keepFor(part.storage().data_ptr(), streamFor(part.device()));
      });
    }
  }
}

void OutboundSlices::begin(const TensorWriter& writer, size_t inlineLimit) {
  chooseWays(writer, inlineLimit);
  lend(writer);
  gather(writer);
}

void OutboundSlices::chooseWays(const TensorWriter& writer, size_t inlineLimit) {
  slices_.resize(writer.slices().size());
  for (size_t i = 0; i < slices_.size(); ++i) {
    Slice& slice = slices_[i];
    slice.bytes = writer.slices()[i].bytes;
    const auto [here, there] = writer.whereabouts()[i];
    if (here.is_cpu()) {
      continue;
    }
    const bool lends = slice.bytes > std::max(kWorthLending, inlineLimit) && !there.is_cpu() &&
        devices_->lender() != nullptr && devices_->lender()->lendsTo(peer_, here.index(), there.index());
    slice.piece = lends ? devices_->lender()->pieceFor(here.index(), slice.bytes) : 0;
    if (slice.piece > 0) {
      slice.way = slice.bytes <= slice.piece ? Way::kLent : Way::kTickets;
    } else {
      slice.way = slice.bytes <= inlineLimit ? Way::kGathered : Way::kBytes;
    }
  }
}

// One piece for all that go from one device to one other, as far as it can be had at once.
void OutboundSlices::lend(const TensorWriter& writer) {
  constexpr size_t kAlignment = 256;
  std::vector<bool> seen(slices_.size());
  for (size_t i = 0; i < slices_.size(); ++i) {
    if (slices_[i].way == Way::kTickets) {
      const c10::Stream& stream = streamOf(streams_, writer.whereabouts()[i].here);
      slices_[i].source = ticketSource(devices_, peer_, stream, writer.slices()[i], slices_[i].piece);
      slices_[i].way = slices_[i].source == nullptr ? Way::kBytes : Way::kTickets;
    }
    if (slices_[i].way != Way::kLent || seen[i]) {
      continue;
    }
    const auto [here, there] = writer.whereabouts()[i];
    std::vector<size_t> together;
    size_t bytes = 0;
    for (size_t k = i; k < slices_.size(); ++k) {
      const auto& other = writer.whereabouts()[k];
      if (slices_[k].way == Way::kLent && !seen[k] && other.here == here && other.there == there &&
          (k == i || bytes + slices_[k].bytes <= kSmallPiece)) {
        seen[k] = true;
        slices_[k].offset = bytes;
        bytes = bytes + slices_[k].bytes;
        bytes += bytes <= kSmallPiece - kAlignment ? (kAlignment - bytes % kAlignment) % kAlignment : 0;
        together.push_back(k);
      }
    }
    const auto lease = tickets_.size() < kTickets ? devices_->lender()->lend(peer_, here.index(), bytes) : std::nullopt;
    if (!lease) { // what would wait for a piece would keep all waiting that is on the bulk channel behind it
      for (const size_t k : together) {
        slices_[k].way = Way::kBytes;
      }
      continue;
    }
    tickets_.push_back(lease->ticket);
    const OnDevice onDevice(devices_->runtime(), here.index());
    void* const stream = devices_->runtime().handleOf(streamOf(streams_, here));
    for (const size_t k : together) {
      slices_[k].ticket = static_cast<uint32_t>(tickets_.size());
      devices_->runtime().copy(lease->memory + slices_[k].offset, writer.slices()[k].data, slices_[k].bytes, stream);
      devices_->counters.sentIpc.fetch_add(slices_[k].bytes, std::memory_order_relaxed);
    }
    events_.push_back(devices_->event(here));
    events_.back().record(stream);
  }
}

void OutboundSlices::gather(const TensorWriter& writer) {
  size_t bytes = 0;
  for (Slice& slice : slices_) {
    if (slice.way == Way::kGathered) {
      slice.offset = bytes;
      bytes += slice.bytes;
    }
  }
  if (bytes == 0) {
    return;
  }
  block_ = devices_->pinned(streams_.front().device(), bytes);
  for (const c10::Stream& stream : streams_) {
    const OnDevice onDevice(devices_->runtime(), stream.device_index());
    void* const handle = devices_->runtime().handleOf(stream);
    bool any = false;
    for (size_t i = 0; i < slices_.size(); ++i) {
      if (wayOf(i) == Way::kGathered && slices_[i].bytes > 0 && writer.whereabouts()[i].here == stream.device()) {
        devices_->runtime().copy(block_.data() + slices_[i].offset, writer.slices()[i].data, slices_[i].bytes, handle);
        any = true;
      }
    }
    if (any) {
      events_.push_back(devices_->event(stream.device()));
      events_.back().record(handle);
    }
  }
  devices_->counters.sentPinned.fetch_add(bytes, std::memory_order_relaxed);
}

bool OutboundSlices::ready() {
  if (events_.empty()) {
    return true;
  }
  if (!std::ranges::all_of(events_, [](const DeviceEvent& event) { return event.complete(); })) {
    return false;
  }
  events_.clear();
  for (const Slice& slice : slices_) {
    if (slice.way == Way::kGathered && slice.bytes > 0) {
      std::memcpy(slice.place, block_.data() + slice.offset, slice.bytes);
    }
  }
  block_ = {};
  return true;
}

// One that is not sent after all leaves the device writing to the block, and to what is lent.
OutboundSlices::~OutboundSlices() {
  if (!events_.empty()) {
    const auto block = std::make_shared<PinnedBlock>(std::move(block_));
    for (DeviceEvent& event : events_) {
      devices_->holdUntil(std::move(event), block);
    }
  }
  if (left_) {
    return;
  }
  try {
    for (const Ticket& ticket : tickets_) {
      const c10::Device device(devices_->type(), static_cast<c10::DeviceIndex>(ticket.device));
      const OnDevice onDevice(devices_->runtime(), device.index());
      DeviceEvent event = devices_->event(device);
      event.record(devices_->runtime().handleOf(streamOf(streams_, device)));
      devices_->holdUntil(std::move(event), std::make_shared<AtLast>([lender = devices_->lender(), ticket] {
                            lender->withdraw(ticket);
                          }));
    }
  } catch (const std::exception&) { // then they are lost
  }
}

std::unique_ptr<ChunkSource> OutboundSlices::sourceOf(const TensorWriter& writer, size_t slice) {
  if (wayOf(slice) == Way::kTickets) {
    return std::move(slices_[slice].source);
  }
  if (wayOf(slice) == Way::kBytes) {
    const c10::Stream& stream = streamOf(streams_, writer.whereabouts()[slice].here);
    return devices_->mpiTakesMemory() ? directSource(devices_, stream, writer.slices()[slice], writer.storageOf(slice))
                                      : pinnedSource(devices_, stream, writer.slices()[slice]);
  }
  return nullptr;
}

c10::Device InboundSlices::device(int index) const {
  require(
      index >= 0 && index <= std::numeric_limits<c10::DeviceIndex>::max(), "a tensor is for a device that cannot be");
  const c10::Device device(devices_->type(), static_cast<c10::DeviceIndex>(index));
  require(devices_->has(device), "a tensor is for a device that this worker does not use");
  return device;
}

void InboundSlices::copy(const std::vector<Copy>& copies) const {
  size_t bytes = 0;
  for (const Copy& each : copies) {
    bytes += each.bytes;
  }
  if (bytes == 0) {
    return;
  }
  const auto block = std::make_shared<PinnedBlock>(devices_->pinned(copies.front().device, bytes));
  for (const c10::Stream& stream : streams_) {
    const OnDevice onDevice(devices_->runtime(), stream.device_index());
    void* const handle = devices_->runtime().handleOf(stream);
    bool any = false;
    DeviceEvent event;
    char* place = block->data();
    for (const Copy& each : copies) {
      if (each.device == stream.device() && each.bytes > 0) {
        if (!any) {
          event = devices_->event(stream.device()); // first: the block must not go while the device reads from it
        }
        std::memcpy(place, each.from, each.bytes);
        devices_->runtime().copy(each.to, place, each.bytes, handle);
        any = true;
      }
      place += each.bytes;
    }
    if (any) {
      event.record(handle);
      devices_->holdUntil(std::move(event), block);
    }
  }
  devices_->counters.receivedPinned.fetch_add(bytes, std::memory_order_relaxed);
}

std::unique_ptr<ChunkSink> InboundSlices::sinkFor(c10::Device device, void* memory, size_t bytes, size_t piece) const {
  const MutableSpan span{static_cast<char*>(memory), bytes};
  if (piece == 0) {
    const c10::Stream& stream = streamOf(streams_, device);
    return devices_->mpiTakesMemory() ? directSink(devices_, stream, span) : pinnedSink(devices_, stream, span);
  }
  require(devices_->borrower() != nullptr, "it lends memory to a worker that takes none");
  return ticketSink(devices_, source_, streamOf(streams_, device), span, piece);
}

void InboundSlices::borrow(const Ticket& ticket) {
  require(devices_->borrower() != nullptr, "it lends memory to a worker that takes none");
  borrowed_.push_back({std::make_shared<Borrower::Loan>(devices_->borrower(), source_, ticket), std::nullopt, nullptr});
}

void InboundSlices::checkLent(uint32_t ticket, size_t offset, size_t bytes) const {
  require(ticket >= 1 && ticket <= borrowed_.size(), "a tensor lies in memory that is not lent");
  const Ticket& lent = borrowed_[ticket - 1].loan->ticket();
  require(offset <= lent.bytes && bytes <= lent.bytes - offset, "a tensor reaches beyond what is lent");
  require(lent.bytes <= uint64_t{lent.regionUnits} * kSizeUnit, "more is lent than there is");
}

void InboundSlices::copyLent(uint32_t ticket, size_t offset, c10::Device device, void* to, size_t bytes) {
  checkLent(ticket, offset, bytes);
  Borrowed& borrowed = borrowed_[ticket - 1];
  const c10::Stream& stream = streamOf(streams_, device);
  require(!borrowed.reader || *borrowed.reader == stream, "memory is lent to two devices at once");
  const OnDevice onDevice(devices_->runtime(), device.index());
  void* const handle = devices_->runtime().handleOf(stream);
  if (!borrowed.reader) {
    try {
      borrowed.memory = devices_->borrower()->open(*borrowed.loan, device.index());
    } catch (const std::out_of_range& error) {
      throw BadMessage(error.what());
    }
    borrowed.reader = stream;
  }
  devices_->runtime().copy(to, borrowed.memory + offset, bytes, handle);
  devices_->counters.receivedIpc.fetch_add(bytes, std::memory_order_relaxed);
}

void InboundSlices::endLoans() {
  for (Borrowed& borrowed : borrowed_) {
    if (borrowed.reader) {
      const OnDevice onDevice(devices_->runtime(), borrowed.reader->device_index());
      DeviceEvent event = devices_->event(borrowed.reader->device());
      event.record(devices_->runtime().handleOf(*borrowed.reader));
      devices_->holdUntil(std::move(event), std::move(borrowed.loan));
    }
  }
  borrowed_.clear();
}

InboundSlices::~InboundSlices() {
  try { // of one that could not be read to its end
    endLoans();
  } catch (const std::exception&) {
  }
}

} // namespace torch_rpc_mpi
