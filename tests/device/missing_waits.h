// Leaves one of the engine's waits out, so that it is seen whether the tests notice. A wait is a call that orders what
// a device does: a stream's or the host's waiting for an event, or the recording of a stream that uses memory. It is
// known by the places in the engine's library that lead to the call: RPCTEST_WAITS_LOG names a file to which each goes
// once, RPCTEST_LEAVE_OUT the one to leave out, as that file has it. missing_waits.py does this for all of them.
#pragma once

namespace rpctest {

class Event;

// Of a query the place is where the event was recorded: the engine asks for all of its events in one place.
bool leavesOut(const char* call, const Event* queried = nullptr);
void noteRecord(const Event* event);

} // namespace rpctest
