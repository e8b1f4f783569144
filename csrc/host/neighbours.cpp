#include "host/neighbours.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <random>
#include <sstream>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

namespace torch_rpc_mpi {

// Of the messages of one rank. Counted by the process whose page this is; `awaited` is set by that rank.
struct alignas(32) Neighbours::Taken {
  std::array<std::atomic<uint64_t>, kKinds> messages;
  std::atomic<uint64_t> awaited; // how many of all kinds; 0: none
};

// Memory is taken for what is used of it alone: the ranks of this host have a few pages of 4 KiB.
struct Neighbours::Page {
  static constexpr size_t kRanks = 32768;
  std::array<uint64_t, 2> mark;
  alignas(64) BellWord bell;
  alignas(64) std::array<Taken, kRanks> taken;
};

namespace {

constexpr size_t kPageBytes = size_t{2} << 20;
constexpr const char* kName = "torch_rpc_mpi_bell";

void* mapPage(int file) {
  void* memory = mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

// A file of another process that is such a page by its name, or -1. In another container the ids of the address may
// mean any file, which must not even be opened.
int openPage(pid_t pid, int number) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(number);
  char target[64] = "";
  if (readlink(path.c_str(), target, sizeof(target) - 1) < 0 ||
      std::string(target).rfind(std::string("/memfd:") + kName, 0) != 0) {
    return -1;
  }
  return open(path.c_str(), O_RDWR | O_CLOEXEC);
}

void closeFile(int file) {
  if (file >= 0) {
    close(file);
  }
}

} // namespace

Neighbours::Neighbours() {
  static_assert(sizeof(Page) <= kPageBytes);
  std::random_device random;
  const std::array<uint64_t, 2> mark{(uint64_t{random()} << 32) | random(), (uint64_t{random()} << 32) | random()};
  file_ = memfd_create(kName, MFD_CLOEXEC);
  void* memory = file_ >= 0 && ftruncate(file_, kPageBytes) == 0 ? mapPage(file_) : nullptr;
  if (memory == nullptr) { // then nobody else can ring
    closeFile(std::exchange(file_, -1));
    memory = mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::system_error(errno, std::generic_category(), "cannot map a page for the doorbell");
    }
  }
  own_ = static_cast<Page*>(memory); // of zeros, and not touched where it is not used
  own_->mark = mark;
  watch_ = epoll_create1(EPOLL_CLOEXEC);
}

Neighbours::~Neighbours() {
  for (Page* page : pages_) {
    if (page != nullptr) {
      munmap(page, kPageBytes);
    }
  }
  closeFile(watch_);
  closeFile(file_);
  munmap(own_, kPageBytes);
}

std::string Neighbours::address() const {
  if (file_ < 0) {
    return "";
  }
  std::ostringstream text;
  text << getpid() << ' ' << file_ << ' ' << own_->mark[0] << ' ' << own_->mark[1];
  return text.str();
}

BellWord& Neighbours::bell() {
  return own_->bell;
}

void Neighbours::meet(const std::vector<std::string>& addresses, int self) {
  self_ = self;
  bells_.assign(addresses.size(), nullptr);
  pages_.assign(addresses.size(), nullptr);
  processes_.resize(addresses.size());
  reachesAll_ = file_ >= 0;
  for (size_t rank = 0; rank < addresses.size(); ++rank) {
    if (static_cast<int>(rank) != self) {
      reachesAll_ = reach(static_cast<int>(rank), addresses[rank]) && reachesAll_;
    }
  }
}

bool Neighbours::reach(int rank, const std::string& address) {
  std::istringstream text(address);
  pid_t pid = 0;
  int number = 0;
  std::array<uint64_t, 2> mark{};
  if (!(text >> pid >> number >> mark[0] >> mark[1])) {
    return false;
  }
  // The process first: when the mark is found after that, the process is the one that wrote it.
  OtherProcess process(pid);
  const int file = openPage(pid, number);
  void* memory = file >= 0 ? mapPage(file) : nullptr;
  closeFile(file);
  auto* page = static_cast<Page*>(memory);
  if (page == nullptr || page->mark != mark) {
    if (page != nullptr) {
      munmap(page, kPageBytes);
    }
    return false;
  }
  pages_[rank] = page;
  bells_[rank] = &page->bell;
  if (process.descriptor() < 0) {
    looksAt_.push_back(rank);
  }
  epoll_event event{};
  event.events = EPOLLIN | EPOLLONESHOT; // a process descriptor is readable when the process has ended
  event.data.u32 = static_cast<uint32_t>(rank);
  if (process.descriptor() >= 0) {
    epoll_ctl(watch_, EPOLL_CTL_ADD, process.descriptor(), &event);
  }
  processes_[rank] = std::move(process);
  return true;
}

// What is counted comes before the look at `awaited`, and in the other process `awaited` before the look at the count,
// all in one order of all threads: so either the one sees that it is to ring, or the other what was counted.
void Neighbours::took(int rank, size_t kind) {
  if (static_cast<size_t>(rank) >= Page::kRanks) {
    return;
  }
  Taken& taken = own_->taken[rank];
  taken.messages[kind].fetch_add(1);
  const uint64_t awaited = taken.awaited.load();
  if (awaited != 0 && taken.messages[0].load() + taken.messages[1].load() >= awaited) {
    taken.awaited = 0;
    ring(rank);
  }
}

std::optional<uint64_t> Neighbours::taken(int rank, size_t kind) const {
  const Page* page = pages_[rank];
  if (page == nullptr || static_cast<size_t>(self_) >= Page::kRanks) {
    return std::nullopt;
  }
  return page->taken[self_].messages[kind].load();
}

void Neighbours::awaitTaking(int rank, uint64_t messages) {
  Page* page = pages_[rank];
  if (page != nullptr && static_cast<size_t>(self_) < Page::kRanks && page->taken[self_].awaited.load() != messages) {
    page->taken[self_].awaited = messages;
  }
}

int Neighbours::host() const {
  const auto first = std::ranges::find_if(bells_, [](const BellWord* bell) { return bell != nullptr; });
  return std::min(self_, first == bells_.end() ? self_ : static_cast<int>(first - bells_.begin()));
}

std::vector<int> Neighbours::takeEnded() {
  std::array<epoll_event, 16> events;
  std::vector<int> ended;
  for (;;) {
    const int count = epoll_wait(watch_, events.data(), static_cast<int>(events.size()), 0);
    for (int i = 0; i < count; ++i) {
      ended.push_back(static_cast<int>(events[i].data.u32));
    }
    if (count < static_cast<int>(events.size())) {
      break;
    }
  }
  std::erase_if(looksAt_, [&](int rank) {
    const bool hasEnded = processes_[rank].hasEnded();
    if (hasEnded) {
      ended.push_back(rank);
    }
    return hasEnded;
  });
  return ended;
}

bool Neighbours::hasEnded(int rank, std::chrono::milliseconds limit) const {
  const auto index = static_cast<size_t>(rank);
  return index < processes_.size() && processes_[index].hasEnded(limit);
}

} // namespace torch_rpc_mpi
