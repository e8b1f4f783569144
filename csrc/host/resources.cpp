#include "host/resources.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <vector>

#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

namespace torch_rpc_mpi {

namespace {

std::string firstWord(std::istream& file) {
  std::string word;
  file >> word;
  return word;
}

// "max", -1 and what version 1 says for "none" (nearly 2^63) limit nothing.
std::optional<double> limitIn(const std::string& word) {
  double value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  return error == std::errc() && value >= 0 && value < 9e18 ? std::optional(value) : std::nullopt;
}

template <typename T>
void tighten(std::optional<T>& limit, std::optional<double> other) {
  if (other) {
    limit = std::min(limit.value_or(std::numeric_limits<T>::max()), static_cast<T>(*other));
  }
}

std::optional<double> read(const std::string& path) {
  std::ifstream file(path);
  return limitIn(firstWord(file));
}

std::optional<double> quotient(std::optional<double> quota, std::optional<double> period) {
  return quota && period && *period > 0 ? std::optional(*quota / *period) : std::nullopt;
}

std::optional<double> readQuotient(const std::string& path) {
  std::ifstream file(path);
  const auto quota = limitIn(firstWord(file));
  return quotient(quota, limitIn(firstWord(file)));
}

// Files that a directory lacks limit nothing, here and below.
void addLimitsOfVersion2(CgroupLimits& limits, const std::string& directory) {
  tighten(limits.memoryBytes, read(directory + "/memory.max"));
  tighten(limits.tasks, read(directory + "/pids.max"));
  tighten(limits.cores, readQuotient(directory + "/cpu.max"));
}

void addLimitsOfVersion1(CgroupLimits& limits, const std::string& directory, const std::string& controller) {
  if (controller == "memory") {
    tighten(limits.memoryBytes, read(directory + "/memory.limit_in_bytes"));
  } else if (controller == "pids") {
    tighten(limits.tasks, read(directory + "/pids.max"));
  } else if (controller == "cpu") {
    tighten(limits.cores, quotient(read(directory + "/cpu.cfs_quota_us"), read(directory + "/cpu.cfs_period_us")));
  }
}

// Calls visit(directory) for each cgroup of this path in the hierarchy that is mounted there, the innermost first.
template <typename Visit>
void forEachCgroup(const std::string& mount, std::string path, const Visit& visit) {
  for (;; path.erase(path.rfind('/'))) {
    visit(mount + path);
    if (path.empty()) {
      return;
    }
  }
}

// What a line of /proc/self/cgroup tells of. Its hierarchy may be version 2 alone, version 2 beside version 1, or
// version 1, mounted by the name of all its controllers or of one of them.
void addLimits(CgroupLimits& limits, const std::string& all, const std::string& controllers, const std::string& path) {
  if (controllers.empty()) {
    for (const std::string& mount : {all, all + "/unified"}) {
      forEachCgroup(mount, path, [&](const std::string& directory) { addLimitsOfVersion2(limits, directory); });
    }
    return;
  }
  std::istringstream each(controllers);
  for (std::string one; std::getline(each, one, ',');) {
    std::vector<std::string> mounts = {all + "/" + controllers};
    if (one != controllers) {
      mounts.push_back(all + "/" + one);
    }
    for (const std::string& mount : mounts) {
      forEachCgroup(mount, path, [&](const std::string& directory) { addLimitsOfVersion1(limits, directory, one); });
    }
  }
}

size_t hostMemory() {
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
}

int coresOfAffinity() {
  for (int known = CPU_SETSIZE; known <= 1 << 20; known *= 2) { // hosts may have more than the usual set holds
    cpu_set_t* cores = CPU_ALLOC(known);
    const size_t bytes = CPU_ALLOC_SIZE(known);
    const int count = sched_getaffinity(0, bytes, cores) == 0 ? CPU_COUNT_S(bytes, cores) : 0;
    CPU_FREE(cores);
    if (count > 0) {
      return count;
    }
  }
  return static_cast<int>(std::max(sysconf(_SC_NPROCESSORS_ONLN), 1L));
}

std::string threadsOfThisProcess() {
  std::ifstream status("/proc/self/status");
  for (std::string key; status >> key;) {
    if (key == "Threads:") {
      return firstWord(status);
    }
  }
  return "an unknown number of";
}

} // namespace

CgroupLimits cgroupLimits(const std::string& root) {
  CgroupLimits limits;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) { // "id:controllers:/path"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) {
      continue;
    }
    std::string path = line.substr(second + 1);
    // In a container the path may lead out of what it sees, or be the host's: what is not there is passed over, down to
    // the mount itself, which then is the container's own.
    if (path == "/" || path.find("/..") != std::string::npos) {
      path.clear();
    }
    addLimits(limits, root + "/sys/fs/cgroup", line.substr(first + 1, second - first - 1), path);
  }
  return limits;
}

size_t usableMemory(const std::string& root) {
  return std::min(cgroupLimits(root).memoryBytes.value_or(hostMemory()), hostMemory());
}

size_t residentMemory(const std::string& root) {
  std::ifstream file(root + "/proc/self/statm");
  size_t all = 0;
  size_t resident = 0;
  file >> all >> resident;
  return resident * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
}

int usableCores(const std::string& root) {
  const int allowed = coresOfAffinity();
  const auto quota = cgroupLimits(root).cores;
  return quota ? std::clamp(static_cast<int>(std::min(std::ceil(*quota), 1e6)), 1, allowed) : allowed;
}

std::string noThreadText(const char* what) {
  rlimit ofUser{};
  getrlimit(RLIMIT_NPROC, &ofUser);
  const auto ofCgroup = cgroupLimits().tasks;
  std::ostringstream text;
  text << "no thread can be started for " << what << ": this process has " << threadsOfThisProcess()
       << " threads. All processes of its user may have ";
  if (ofUser.rlim_cur == RLIM_INFINITY) {
    text << "any number";
  } else {
    text << ofUser.rlim_cur;
  }
  text << " (ulimit -u), and those of its cgroup ";
  if (ofCgroup) {
    text << *ofCgroup;
  } else {
    text << "any number";
  }
  text << " (pids.max). Raise the limit, or let the processes have fewer threads (OMP_NUM_THREADS)";
  return text.str();
}

} // namespace torch_rpc_mpi
