#include "host/resources.h"

#include <algorithm>
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
  try {
    const double value = std::stod(word);
    return value >= 0 && value < 9e18 ? std::optional(value) : std::nullopt;
  } catch (const std::exception&) {
    return std::nullopt;
  }
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

// Version 2: "quota period" in one file; version 1: two files.
std::optional<double> cores(const std::string& directory) {
  std::ifstream both(directory + "/cpu.max");
  auto quota = limitIn(firstWord(both));
  auto period = limitIn(firstWord(both));
  if (!both.is_open()) {
    quota = read(directory + "/cpu.cfs_quota_us");
    period = read(directory + "/cpu.cfs_period_us");
  }
  return quota && period && *period > 0 ? std::optional(*quota / *period) : std::nullopt;
}

// Files that a directory lacks, because it has not that controller, limit nothing.
void addLimits(CgroupLimits& limits, const std::string& directory) {
  tighten(limits.memoryBytes, read(directory + "/memory.max"));
  tighten(limits.memoryBytes, read(directory + "/memory.limit_in_bytes"));
  tighten(limits.tasks, read(directory + "/pids.max"));
  tighten(limits.cores, cores(directory));
}

// Where the hierarchy may be mounted of which a line of /proc/self/cgroup tells: version 2 alone, version 2 beside
// version 1, or version 1, by its controllers or by one of them.
std::vector<std::string> mounts(const std::string& controllers) {
  const std::string all = "/sys/fs/cgroup";
  if (controllers.empty()) {
    return {all, all + "/unified"};
  }
  std::vector<std::string> result = {all + "/" + controllers};
  std::istringstream each(controllers);
  for (std::string one; std::getline(each, one, ',');) {
    result.push_back(all + "/" + one);
  }
  return result;
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
    for (const std::string& mount : mounts(line.substr(first + 1, second - first - 1))) {
      for (std::string at = path;; at.erase(at.rfind('/'))) {
        addLimits(limits, root + mount + at);
        if (at.empty()) {
          break;
        }
      }
    }
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
