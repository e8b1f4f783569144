// What passes on a connection between two processes of a group: a greeting one way, single bytes the other.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string>

namespace torch_rpc_mpi {

enum class Purpose : uint32_t {
  kWatch = 1, // the other one sends a beat at once, and then again and again
  kAsk = 2    // the other one answers whether the rank that it is asked about has ended
};

enum class Signal : char { kBeat = 'B', kLeaves = 'L', kLives = 'A', kEnded = 'E' };

constexpr size_t kSecretBytes = 32;

// As it lies in memory: all ranks have one architecture.
struct Greeting {
  std::array<char, 8> magic{'T', 'R', 'M', 'W', 'A', 'T', 'C', '1'};
  std::array<char, kSecretBytes> secret{};
  uint32_t to = 0;
  Purpose purpose = Purpose::kWatch;
  uint32_t about = 0;

  // Whether one who knows the secret of this one has sent it. Takes as long for every wrong one.
  bool matches(const Greeting& expected) const {
    unsigned different = 0;
    for (size_t i = 0; i < secret.size(); ++i) {
      different |= static_cast<unsigned char>(secret[i]) ^ static_cast<unsigned char>(expected.secret[i]);
    }
    return magic == expected.magic && different == 0 && to == expected.to;
  }
};
static_assert(sizeof(Greeting) == 52);

} // namespace torch_rpc_mpi
