// Python's signals in threads that wait in C++.
#pragma once

#include <pthread.h>

#include "base/signal_service.h"

namespace torch_rpc_mpi {

// Runs the handlers that are due, in Python's main thread; what one raises is thrown. Called without the GIL.
extern const SignalService kPythonSignals;

// The thread in which Python runs the handlers of signals. A wrong one, or none, means only that they run later.
pthread_t pythonsMainThread();

// Learns of that thread, with the GIL.
void findPythonsMainThread();

} // namespace torch_rpc_mpi
