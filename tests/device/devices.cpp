#include "devices.h"

#include <atomic>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include <unistd.h>

namespace rpctest {

namespace {

constexpr int kMostDevices = 64; // the bits of a set of contexts

thread_local int current = 0;
std::atomic<uint64_t> touched{0};
std::atomic<pid_t> owner{0}; // of the contexts

bool isSet(const char* name) {
  const char* value = getenv(name);
  return value != nullptr && *value != '\0' && std::string(value) != "0";
}

std::atomic<bool>& ipcSwitch() {
  static std::atomic<bool> allowed{!isSet("RPCTEST_NO_IPC")};
  return allowed;
}

// Physical devices in the order of their numbers here. As with CUDA the list ends at the first that does not exist.
const std::vector<int>& visible() {
  static const std::vector<int> devices = [] {
    const auto count = static_cast<int>(environmentNumber("RPCTEST_DEVICES", 2));
    const char* named = getenv("RPCTEST_VISIBLE_DEVICES");
    std::vector<int> found;
    if (named == nullptr) {
      for (int device = 0; device < count && device < kMostDevices; ++device) {
        found.push_back(device);
      }
      return found;
    }
    std::istringstream numbers{named};
    for (std::string number; std::getline(numbers, number, ',');) {
      const int device = atoi(number.c_str());
      if (number.empty() || device < 0 || device >= count) {
        break;
      }
      found.push_back(device);
    }
    return found;
  }();
  return devices;
}

} // namespace

int64_t environmentNumber(const char* name, int64_t otherwise) {
  const char* value = getenv(name);
  return value == nullptr || *value == '\0' ? otherwise : atoll(value);
}

int deviceCount() {
  return static_cast<int>(visible().size());
}

int physicalDevice(int device) {
  return device < 0 || device >= deviceCount() ? -1 : visible()[static_cast<size_t>(device)];
}

int visibleDevice(int physical) {
  for (int device = 0; device < deviceCount(); ++device) {
    if (physicalDevice(device) == physical) {
      return device;
    }
  }
  return -1;
}

int currentDevice() {
  return current;
}

void setCurrentDevice(int device) {
  current = device;
}

void touch(int device) {
  if (touched.fetch_or(uint64_t{1} << device) == 0) {
    owner = getpid();
  }
}

bool hasContext(int device) {
  return (touched >> device & 1) != 0;
}

uint64_t contexts() {
  return touched;
}

bool inBadFork() {
  return touched != 0 && owner != getpid();
}

bool canAccessPeer(int device, int peer) {
  static const bool possible = !isSet("RPCTEST_NO_PEER");
  return possible && device != peer;
}

bool ipcAllowed() {
  return ipcSwitch();
}

void allowIpc(bool allowed) {
  ipcSwitch() = allowed;
}

} // namespace rpctest
