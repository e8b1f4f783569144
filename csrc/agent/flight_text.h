// What a file of the flight recorder says.
#pragma once

#include <string>
#include <unordered_map>

#include "agent/caller.h"
#include "agent/membership.h"
#include "agent/server.h"

namespace torch_rpc_mpi {

// JSON: who wrote it and why, the last events, the calls that are unanswered, the requests that run, the workers that
// were lost, and the metrics. docs/faults.md describes it. Times in seconds.
std::string flightText(
    const std::string& why,
    const Membership& members,
    const Caller& caller,
    const Server& server,
    const std::unordered_map<std::string, std::string>& metrics);

} // namespace torch_rpc_mpi
