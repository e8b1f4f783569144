// The engine, and what its threads, callers and a peer do with it, as a machine small enough to be explored whole.
//
// A step stands for what the code does between two moments at which another thread could tell the difference: one
// access to something that threads share, with all that this thread alone can see, or one critical section, split where
// it reads an atomic that others write without the mutex. Each step names the function that it stands for.
//
// Left out: what time decides. A leader may go to sleep after any look in vain, a guest may leave after any, a tick may
// come at any moment and find any task stuck. But a sleep at the doorbell has no limit here, and so it can hide no lost
// wake-up; only the end of a peer's process, which rings nobody, lets it end. Deadlines are left out, and so calls to a
// peer that has ended fail here at once; also naps, credits, bulk streams and draining, and a peer of another host,
// which cannot ring.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace model {

// Calls, requests of the peer, the tasks that they make here and the messages that carry them: one bit each.
using Set = uint8_t;
constexpr Set kCalls = 0x0f;     // of the callers, by their index
constexpr Set kInnerCall = 0x08; // which the function makes that the peer's first request runs
constexpr Set kRequests = 0x70;  // of the peer
constexpr Set kFirstRequest = 0x10;
constexpr Set kSecondRequest = 0x20;
constexpr Set kGoodbye = 0x80;

// Where a thread stands: what its next step is.
enum class At : uint8_t {
  kNowhere, // a thread that is not there
  kDone,
  // ThreadedEngine::nextTask, take, standBy
  kNext,
  kTicking,
  kParked,
  // ThreadedEngine::threadMain
  kRun,
  kInnerCall,
  kInnerWait,
  kMeet,
  kTaskEnded,
  // ThreadedEngine::lead
  kLead,
  kLeadTurned,
  kLeadSenders,
  kLeadLook,
  kLeadEnd,
  // ThreadedEngine::sleep, Doorbell
  kTicket,
  kSecondLook,
  kSleepLooked,
  kFutex,
  kInFutex,
  // Dispatcher::turn
  kTurnPost,
  kTurnPoll,
  kTurnGone,
  // ThreadedEngine::turnOnce
  kTurnEnd,
  kTurnRelease,
  kBreakDown,
  kOnBroken,
  // ThreadedEngine::queue, wakeLeader, Doorbell::ring
  kPost,
  kPostLook,
  kWakeLeader,
  kRingLook,
  kRingWake,
  // Outbox::submit, ThreadedEngine::submitted
  kSubmit,
  kSubmitted,
  kSubmittedReply,
  kSubmittedWake,
  kTaskMayWait,
  // Caller::call, and the wait for the answer
  kSend,
  kSendLook,
  kAwait,
  // ThreadedEngine::driveFor
  kDrive,
  kDriveLoop,
  kDriveTurned,
  kDriveIdle,
  kDriveNeeded,
  kDriveLeave,
  kDriveAsleep,
  kDriveMine,
  // Leaving::leave, ThreadedEngine::stop
  kStop,
  kStopUnlock,
  kStopJoin,
  kClose,
  kFailAll,
  // the peer
  kPeer,
};

struct Thread {
  At at = At::kNowhere;
  At afterTurn = At::kNowhere, afterPost = At::kNowhere, afterRing = At::kNowhere, afterSubmit = At::kNowhere;
  Set tasks = 0; // that its turn yielded, or that it posts
  Set task = 0;  // an engine thread's: what it runs; a caller's: its call
  Set out = 0;   // the message that it submits
  uint8_t mayLead : 1 = 0, spinning : 1 = 0, active : 1 = 0, notified : 1 = 0;
  uint8_t expectsReply : 1 = 0, announced : 1 = 0, waiting : 1 = 0, neededOn : 1 = 0;
  uint8_t mine : 1 = 0;                                   // it has the completion that it waits for
  uint8_t queued : 1 = 0, threw : 1 = 0, padding : 5 = 0; // of its turn
};

constexpr int kEngineThreads = 4; // at most
constexpr int kCallers = 2;       // at most
constexpr int kThePeer = kEngineThreads + kCallers;
constexpr int kTheStopper = kThePeer + 1;
constexpr int kThreads = kTheStopper + 1;

enum class Gone : uint8_t { kNo, kLeft, kEnded };

struct State {
  std::array<Thread, kThreads> threads;
  // ThreadedEngine. threads_, parked_ and ticking_ follow from where the threads are.
  uint8_t mutex : 1 = 0, token : 1 = 0, leading : 1 = 0, asleep : 1 = 0;
  uint8_t guest : 1 = 0, guestUntil : 1 = 0, stopping : 1 = 0, broken : 1 = 0;
  uint8_t called : 1 = 0;
  uint8_t ledSince : 1 = 0; // somebody began to lead since the ticking one began to wait
  // BellWord. Of `rings` only whether it still is the sleeper's ticket.
  uint8_t sleepers : 2 = 0, rung : 1 = 0;
  uint8_t sleeperUnseen : 1 = 0; // the sleeper's count has not reached the others' processors
  // Caller and Exchange
  uint8_t closed : 1 = 0, callsClosed : 1 = 0;
  // the peer's process
  uint8_t peerEnded : 1 = 0, endNoticed : 1 = 0;
  uint8_t requestsAtOnce : 2 = 1, completionsAtOnce : 2 = 1, padding : 2 = 0;
  Gone gone = Gone::kNo;
  Set requests = 0, completions = 0; // the queues of TaskLanes
  Set outbox = 0;
  Set calls = 0;    // CallTable
  Set arrivals = 0; // of a turn
  // Calls that have come to the peer; its answers and requests come back through its processor's store buffer.
  Set atPeer = 0, stored = 0, inbox = 0;
  Set asked = 0, answered = 0; // requests of the peer
  // What became of each
  Set completed = 0;                  // calls
  Set made = 0, ran = 0, dropped = 0; // tasks
};

enum class Caller : uint8_t {
  kWaits,  // calls the peer and waits
  kDrives, // the same as a guest
  kCallsItself
};

enum class Peer : uint8_t { kStays, kLeaves, kFails };

// What there is to be done. All of it happens in every order.
struct Setup {
  const char* name = "";
  int engineThreads = 2; // the process may have no more
  std::vector<Caller> callers = {};
  int requests = 0;       // that the peer makes
  bool innerCall = false; // the function that the first of them runs calls the peer, and waits
  Set waits = 0;          // those whose function waits for a caller's answer, or else until another was answered
  bool stops = false;     // shutdown without join, at any moment
  Peer peer = Peer::kStays;
  bool breaks = false;  // the transport may throw, once
  bool oneCore = false; // to spare: the standby steps in more rarely
};

// Each a defect that the code could have.
enum class Mutation : uint8_t {
  kNone,
  kRingUnordered,
  kPrepareUnordered,
  kNoSecondLook,
  kLateTicket,
  kRingUncounted,
  kSleepDropsToken,
  kSubmitDropsToken,
  kPostSilent,
  kStopSilent,
  kTakeSilent,
  kTakesLastThread,
  kLastTakesNothing,
  kParksForGuest,
  kPostAfterStop,
  kResponseKeepsCall,
  kGoneCallsForgotten,
  kGoneStillSent,
  kGoneTwice,
  kBrokenArrivalsLost,
  kQueuesLate,
  kSubmitLeavesQueued,
};

class EngineModel {
 public:
  using State = model::State;

  EngineModel(Setup setup, Mutation mutation);

  State initial() const;
  int actors() const;
  bool step(State& s, int actor, int choice);
  int choices() const {
    return choices_;
  }
  const char* violation() const {
    return violation_;
  }
  std::string name(int actor) const;
  bool finished(const State& s) const;
  int unnoticed(const State& s) const;
  State canonical(const State& s) const;

 private:
  // What is no thread of anybody's.
  static constexpr int kClock = kThreads;
  static constexpr int kMemory = kThreads + 1;
  static constexpr int kDeath = kThreads + 2;

  bool is(Mutation mutation) const {
    return mutation_ == mutation;
  }
  bool has(Caller kind) const;
  int pick(int choices); // which of them the step takes
  void violate(const char* what);
  static void go(Thread& t, At& after); // to where the called function was called

  // engine_threads.cpp
  bool stepOfEngineThread(State& s, Thread& t);
  bool stepOfLeader(State& s, Thread& t);
  bool stepOfSleeper(State& s, Thread& t);
  bool stepOfTask(State& s, Thread& t);
  bool nextTask(State& s, Thread& t);
  bool take(State& s, Thread& t);
  static bool spawn(State& s, int limit); // false: the process may have no more threads
  void wakeIdleThread(State& s) const;
  static void notifyParked(State& s);
  void standBy(State& s, Thread& t);
  static bool ticking(const State& s);

  // task_lanes.cpp
  static int threads(const State& s);
  int running(const State& s, Set kind) const;
  bool mayTakeAnother(const State& s, Set kind) const;
  bool mayRun(const State& s, Set kind) const;
  bool runnable(const State& s) const;
  bool backlog(const State& s) const;
  void enqueue(State& s, Set& tasks);
  static void update(State& s);
  void look(State& s);

  // callers.cpp
  bool stepOfTurn(State& s, Thread& t);
  bool stepOfPost(State& s, Thread& t);
  bool stepOfSubmit(State& s, Thread& t);
  bool stepOfCaller(State& s, Thread& t);
  void turnOnce(State& s, Thread& t, At after);
  bool turnForSenders(State& s, Thread& t, At after); // whether there is one more
  static void ring(Thread& t, At after);
  static void wakeLeader(Thread& t, At after);
  static void submit(Thread& t, Set message, At after);
  static void call(State& s, Thread& t, Set id, At after);
  void complete(State& s, Set calls);
  void drop(State& s, Set& tasks);
  void receive(State& s, Thread& t);
  bool onPeerEnded(State& s, Gone why); // whether it is the first to say so
  void threw(State& s, Thread& t);

  // guests.cpp
  bool stepOfGuest(State& s, Thread& t);

  // surroundings.cpp
  bool stepOfStopper(State& s, Thread& t);
  bool stepOfPeer(State& s, Thread& t);
  bool stepOfClock(State& s);
  bool stepOfMemory(State& s);
  bool stepOfDeath(State& s);

  const Setup setup_;
  const Mutation mutation_;
  Set requestTasks_ = kRequests; // of Task::Kind::kRequest
  Set completionTasks_ = 0;

  const char* step_ = "";
  const char* violation_ = nullptr;
  int choice_ = 0;
  int choices_ = 1;
};

} // namespace model
