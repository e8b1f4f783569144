#include "launch/shared_files.h"

#include <array>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <system_error>

namespace torch_rpc_mpi {

namespace {

// As MPICH makes a number of the name, by which it calls its files (5.0, mpir_pmi.c): FNV-1a.
uint32_t numberOf(const std::string& world) {
  uint32_t number = 2166136261U;
  for (const char c : world) {
    number = (number ^ static_cast<uint8_t>(c)) * 16777619U;
  }
  return number;
}

} // namespace

void removeSharedFiles(const std::string& world) noexcept {
  std::array<char, 16> number{};
  std::snprintf(number.data(), number.size(), "_%x_", numberOf(world)); // before the number of a node
  try {
    std::error_code ignored;
    for (const auto& file : std::filesystem::directory_iterator("/dev/shm", ignored)) {
      const std::string name = file.path().filename();
      if (name.starts_with("mpich_") && name.find(number.data()) != std::string::npos) {
        std::filesystem::remove(file.path(), ignored);
      }
    }
  } catch (const std::exception&) { // no memory, or the folder changes: they stay
  }
}

} // namespace torch_rpc_mpi
