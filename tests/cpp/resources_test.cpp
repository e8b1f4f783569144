#include "host/resources.h"

#include <filesystem>
#include <fstream>
#include <map>

#include <sched.h>
#include <unistd.h>

#include "base/deadline.h"
#include "check.h"
#include "host/no_memory.h"
#include "no_threads.h"

using namespace torch_rpc_mpi;

namespace {

// The files of a system, as some were recorded.
class Root {
 public:
  explicit Root(const std::map<std::string, std::string>& files) {
    char name[] = "/tmp/torch_rpc_mpi_root_XXXXXX";
    CHECK_THAT(mkdtemp(name) != nullptr);
    path_ = name;
    for (const auto& [file, text] : files) {
      const std::filesystem::path path = path_ + file;
      std::filesystem::create_directories(path.parent_path());
      std::ofstream(path) << text;
    }
  }
  ~Root() {
    std::filesystem::remove_all(path_);
  }
  Root(const Root&) = delete;
  Root& operator=(const Root&) = delete;
  operator const std::string&() const { // NOLINT(google-explicit-constructor): it stands for its path
    return path_;
  }

 private:
  std::string path_;
};

constexpr size_t kGiB = size_t{1} << 30;

} // namespace

TEST(resources_of_a_container_with_its_own_cgroup_namespace) {
  const Root root({
      {"/proc/self/cgroup", "0::/\n"},
      {"/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids rdma\n"},
      {"/sys/fs/cgroup/memory.max", "2147483648\n"},
      {"/sys/fs/cgroup/cpu.max", "150000 100000\n"},
      {"/sys/fs/cgroup/pids.max", "512\n"},
  });
  const CgroupLimits limits = cgroupLimits(root);
  CHECK_EQUAL(limits.memoryBytes.value(), 2 * kGiB);
  CHECK_EQUAL(limits.cores.value(), 1.5);
  CHECK_EQUAL(limits.tasks.value(), 512U);
  CHECK_THAT(usableMemory(root) <= 2 * kGiB);
  CHECK_THAT(usableCores(root) >= 1 && usableCores(root) <= 2);
}

TEST(resources_of_a_job_step_are_bounded_by_those_of_its_job) {
  const std::string slurm = "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7";
  const Root root({
      {"/proc/self/cgroup", "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_1\n"},
      {"/sys/fs/cgroup/system.slice/memory.max", "max\n"},
      {slurm + "/memory.max", "4294967296\n"},
      {slurm + "/cpu.max", "max 100000\n"},
      {slurm + "/step_0/memory.max", "8589934592\n"},
      {slurm + "/step_0/user/memory.max", "max\n"},
      {slurm + "/step_0/user/task_1/memory.max", "max\n"},
      {slurm + "/step_0/user/task_1/cpu.max", "25000 100000\n"},
  });
  CHECK_EQUAL(cgroupLimits(root).memoryBytes.value(), 4 * kGiB);
  CHECK_EQUAL(cgroupLimits(root).cores.value(), 0.25);
  CHECK_THAT(!cgroupLimits(root).tasks.has_value());
  CHECK_EQUAL(usableCores(root), 1);
}

TEST(resources_of_cgroups_of_version_1) {
  const Root root({
      {"/proc/self/cgroup",
       "12:pids:/user.slice\n11:memory:/slurm/uid_1000/job_9\n4:cpu,cpuacct:/slurm/job_9\n1:name=systemd:/user.slice\n"
       "0::/user.slice\n"},
      {"/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"},
      {"/sys/fs/cgroup/memory/slurm/uid_1000/memory.limit_in_bytes", "3221225472\n"},
      {"/sys/fs/cgroup/memory/slurm/uid_1000/job_9/memory.limit_in_bytes", "9223372036854771712\n"},
      {"/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"},
      {"/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"},
      {"/sys/fs/cgroup/cpu,cpuacct/slurm/job_9/cpu.cfs_quota_us", "300000\n"},
      {"/sys/fs/cgroup/cpu,cpuacct/slurm/job_9/cpu.cfs_period_us", "100000\n"},
      {"/sys/fs/cgroup/pids/user.slice/pids.max", "10813\n"},
  });
  CHECK_EQUAL(cgroupLimits(root).memoryBytes.value(), 3 * kGiB);
  CHECK_EQUAL(cgroupLimits(root).cores.value(), 3.0);
  CHECK_EQUAL(cgroupLimits(root).tasks.value(), 10813U);
}

// The path is the host's there, and what is mounted is the container's own.
TEST(resources_of_a_container_that_sees_the_paths_of_its_host) {
  const Root root({
      {"/proc/self/cgroup", "5:memory:/docker/0123abcd\n3:cpu,cpuacct:/docker/0123abcd\n0::/../../docker/0123abcd\n"},
      {"/sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n"},
      {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000\n"},
      {"/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"},
      {"/sys/fs/cgroup/unified/pids.max", "500\n"},
      {"/sys/fs/cgroup/unified/memory.max", "max\n"},
      {"/sys/fs/cgroup/memory/pids.max", "3\n"}, // of no controller that is there
  });
  CHECK_EQUAL(cgroupLimits(root).memoryBytes.value(), kGiB);
  CHECK_EQUAL(cgroupLimits(root).cores.value(), 1.0);
  CHECK_EQUAL(cgroupLimits(root).tasks.value(), 500U);
}

TEST(resources_without_cgroups_are_those_of_the_host_and_the_affinity) {
  const Root root({{"/proc/version", "Linux"}, {"/proc/self/statm", "7 3\n"}});
  const auto pages = static_cast<size_t>(sysconf(_SC_PHYS_PAGES));
  const auto pageBytes = static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
  CHECK_EQUAL(usableMemory(root), pages * pageBytes);
  CHECK_EQUAL(residentMemory(root), 3 * pageBytes);
  cpu_set_t before;
  CHECK_EQUAL(sched_getaffinity(0, sizeof(before), &before), 0);
  CHECK_EQUAL(usableCores(root), CPU_COUNT(&before));
  cpu_set_t one;
  CPU_ZERO(&one);
  for (int core = 0; CPU_COUNT(&one) == 0; ++core) {
    if (CPU_ISSET(core, &before)) {
      CPU_SET(core, &one);
    }
  }
  CHECK_EQUAL(sched_setaffinity(0, sizeof(one), &one), 0);
  const int cores = usableCores(root);
  CHECK_EQUAL(sched_setaffinity(0, sizeof(before), &before), 0);
  CHECK_EQUAL(cores, 1);
}

TEST(resources_that_lack_are_named_with_their_limits) {
  CHECK_THROWS(throw NoMemory("a body", 12345), "no memory for a body of 12345 bytes");
  CHECK_THROWS(throw NoMemory("a body", 12345), "may use " + std::to_string(usableMemory()));
  const NoThreads none;
  CHECK_THROWS(startThread("a test", [] {}).join(), "no thread can be started for a test: this process has ");
  CHECK_THROWS(startThread("a test", [] {}).join(), "(ulimit -u)");
  CHECK_THROWS(startThread("a test", [] {}).join(), "(pids.max)");
}

TEST(deadlines_do_not_overflow) {
  using SteadyClock = std::chrono::steady_clock;
  const auto never = SteadyClock::time_point::max();
  for (const double seconds : {0.0, 1e10, 3e10, 1e18, 1e300}) {
    CHECK_THAT(deadlineAfter(seconds) == never);
  }
  const auto now = SteadyClock::now();
  CHECK_THAT(
      deadlineAfter(kLongestWait) > now + std::chrono::hours(24 * 365 * 30) && deadlineAfter(kLongestWait) < never);
  CHECK_THAT(deadlineAfter(1.5) >= now + std::chrono::milliseconds(1500));
  CHECK_THAT(deadlineAfter(1.5) < now + std::chrono::hours(1));
  for (const double seconds : {1e10, 1e18, 1e300}) {
    CHECK_EQUAL(durationOf<std::chrono::milliseconds>(seconds).count(), 1'000'000'000'000);
    CHECK_EQUAL(durationOf<std::chrono::nanoseconds>(seconds).count(), 1'000'000'000'000'000'000);
  }
}
