// Lets the MPICH family form a world without a launcher: each process serves PMI-1 to its own MPI, and the servers meet
// in a c10d store.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "launch/companions.h"

namespace torch_rpc_mpi {

// This process's place in the world that is to be formed, as MPI will see it.
struct PmiPlace {
  int rank = 0;
  int size = 1;
  // Names the world. No two worlds may ever share one on a host: MPI names its shared memory after it.
  std::string world;
  // Which ranks share a host, in PMI's notation: "(vector,(first node,nodes,ranks per node),...)".
  std::string mapping;
};

// The simple process manager interface, version 1 (Flux RFC 13; MPICH's wiki calls it "simple PMI"): lines of
// "cmd=name key=value ..." over a socket, of which MPI holds the other end by the variable PMI_FD.
//
// MPI_Init blocks on the answers, possibly with the GIL held, so they come from a thread that never needs it (unless
// the store itself is written in Python).
//
// Members belong to the thread once it runs, but for the sockets, which do not change while it does, and those that
// mutex_ guards.
class PmiServer {
 public:
  // The store belongs to this world alone. timeout: how long ranks wait for each other at one of PMI's barriers.
  // companions: of whom one may be why the store does not answer.
  PmiServer(
      c10::intrusive_ptr<c10d::Store> store,
      PmiPlace place,
      std::chrono::milliseconds timeout,
      std::shared_ptr<Companions> companions);
  ~PmiServer();
  PmiServer(const PmiServer&) = delete;
  PmiServer& operator=(const PmiServer&) = delete;

  // What PMI_FD must say. MPI closes it, or nobody.
  int clientSocket() const {
    return client_;
  }
  // Ends the conversation: what MPI asks from then on gets no answer but an error.
  void stop();
  // For when MPI_Init has returned. What MPI asks from then on is answered without the store, and waits for nobody:
  // other ranks may have ended. MPI_Abort ends this process; whereabouts: who and where it is.
  void serveAlone(std::string whereabouts);

 private:
  void serve();
  // The answer to one line.
  std::string answer(const std::string& line);
  [[noreturn]] void abort(const std::string& line) const;
  std::string put(const std::string& line);
  std::string get(const std::string& line);
  void barrier();

  const PmiPlace place_;
  const std::chrono::milliseconds timeout_;
  const std::shared_ptr<Companions> companions_;
  int client_ = -1;
  int server_ = -1;
  int barriers_ = 0;
  std::mutex mutex_;
  c10::intrusive_ptr<c10d::Store> store_; // guarded by mutex_, as what follows; null once it serves alone
  std::string whereabouts_;
  std::thread thread_;
};

} // namespace torch_rpc_mpi
