#include "mpi/mpi_library.h"

#include <atomic>
#include <cstdlib>

#include <dlfcn.h>
#include <unistd.h>

namespace torch_rpc_mpi {

namespace {

constexpr size_t kTextCapacity = 8192; // MPI_MAX_LIBRARY_VERSION_STRING of the largest ABI

void* openLibrary(const std::string& path, int flags, const char* what) {
  void* handle = dlopen(path.c_str(), flags);
  if (handle == nullptr) {
    const char* reason = dlerror();
    throw std::runtime_error(
        std::string("cannot open ") + what + " " + path + ": " + (reason != nullptr ? reason : "it is not loaded"));
  }
  return handle;
}

} // namespace

MpiLibrary::MpiLibrary(const std::string& shimPath, const std::string& extensionPath) {
  void* shim = openLibrary(shimPath, RTLD_NOW | RTLD_LOCAL, "the MPI shim");
  auto open = reinterpret_cast<trm_open_table_fn>(dlsym(shim, TRM_OPEN_TABLE_SYMBOL));
  if (open == nullptr) {
    throw std::runtime_error(shimPath + " is not an MPI shim of torch_rpc_mpi; reinstall torch_rpc_mpi");
  }
  // RTLD_NOLOAD: a second copy of the extension would bring a second, uninitialised MPI.
  void* extension = openLibrary(extensionPath, RTLD_NOW | RTLD_NOLOAD, "mpi4py's extension");
  char error[512] = "";
  table_ = open(extension, error, sizeof(error));
  if (table_ == nullptr) {
    throw std::runtime_error(
        std::string("the MPI library that mpi4py has loaded does not fit: ") + error +
        "; check that mpi4py and its MPI are of one ABI (python -m mpi4py --mpi-lib-version)");
  }
  if (table_->version != TRM_MPI_TABLE_VERSION) {
    throw std::runtime_error(shimPath + " is of another version of torch_rpc_mpi; reinstall torch_rpc_mpi");
  }
}

std::string MpiLibrary::errorText(int code) const {
  char text[1024] = "";
  if (table_->error_string(code, text, sizeof(text)) != 0 || text[0] == '\0') {
    return "MPI error code " + std::to_string(code);
  }
  return text;
}

void MpiLibrary::check(int code, const char* call) const {
  if (code != 0) {
    throw MpiError(std::string(call) + " failed: " + errorText(code));
  }
}

bool MpiLibrary::initialized() const {
  int flag = 0;
  check(table_->initialized(&flag), "MPI_Initialized");
  return flag != 0;
}

bool MpiLibrary::finalized() const {
  int flag = 0;
  check(table_->finalized(&flag), "MPI_Finalized");
  return flag != 0;
}

int MpiLibrary::threadLevel() const {
  int level = TRM_THREAD_SINGLE;
  check(table_->query_thread(&level), "MPI_Query_thread");
  return level;
}

void MpiLibrary::initialize() const {
  int provided = TRM_THREAD_SINGLE;
  check(table_->init_thread(TRM_THREAD_MULTIPLE, &provided), "MPI_Init_thread");
}

void MpiLibrary::abort(intptr_t communicator, int status) const {
  // MPI leaves by exit(), but nothing may be destroyed while threads still use it.
  static std::atomic<int> ended{0};
  ended = status;
  std::atexit([] { _exit(ended); });
  trm_handle handle = table_->comm_null;
  if (table_->comm_from_int(communicator, &handle) == 0) {
    table_->comm_abort(handle, status);
  }
  _exit(status);
}

std::string MpiLibrary::libraryVersion() const {
  std::string text(kTextCapacity, '\0');
  check(table_->get_library_version(text.data(), text.size()), "MPI_Get_library_version");
  text.resize(text.find('\0') == std::string::npos ? text.size() : text.find('\0'));
  return text;
}

} // namespace torch_rpc_mpi
