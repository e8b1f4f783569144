// ThreadedEngine::driveFor.
#include "model/engine_model.h"

namespace model {

bool EngineModel::stepOfGuest(State& s, Thread& t) {
  switch (t.at) {
    case At::kDrive:
      t.announced = 0;
      if (s.guest) {
        step_ = "driveFor: there is a guest already";
        ring(t, At::kAwait);
      } else {
        step_ = "driveFor: becomes the guest";
        s.guest = 1;
        t.at = At::kDriveLoop;
      }
      return true;
    case At::kDriveLoop:
      if (t.mine || (s.completed & t.task) || s.stopping || s.broken) {
        step_ = "driveFor: is over";
        t.at = At::kDriveNeeded;
      } else if (s.token) {
        step_ = "driveFor: another has the token";
        t.at = At::kDriveIdle;
      } else {
        step_ = "driveFor: has the token";
        turnOnce(s, t, At::kDriveTurned);
      }
      return true;
    case At::kDriveTurned:
      if (t.mine && turnForSenders(s, t, At::kDriveTurned)) {
        return true;
      }
      t.at = At::kDriveIdle;
      return stepOfGuest(s, t);
    case At::kDriveIdle: {
      t.active = 0;
      t.queued = 0;
      const bool stays = t.mine || pick(2) == 0;
      step_ = stays ? "driveFor: goes on" : "driveFor: its time is over";
      t.at = stays ? At::kDriveLoop : At::kDriveNeeded;
      return true;
    }
    case At::kDriveNeeded:
      step_ = "driveFor: looks whether somebody waits for an answer, or has queued something";
      t.neededOn = (!t.mine && !(s.completed & t.task)) || s.calls != 0 || s.outbox != 0;
      t.at = At::kDriveLeave;
      return true;
    case At::kDriveLeave:
      step_ = "driveFor: leaves, guestUntil_ and guest_";
      s.guestUntil = !t.neededOn;
      s.guest = 0;
      t.at = At::kDriveAsleep;
      return true;
    case At::kDriveAsleep:
      step_ = "driveFor: looks whether the leader is asleep";
      if (t.neededOn || s.asleep) {
        wakeLeader(t, At::kDriveMine);
      } else {
        t.at = At::kDriveMine;
      }
      t.neededOn = 0;
      return true;
    case At::kDriveMine:
      step_ = "driveFor: completes its call, if it has the answer";
      if (t.mine) {
        if ((s.ran | s.dropped) & t.task) {
          violate("a task runs twice, or after it was dropped");
        }
        s.ran |= t.task;
        complete(s, t.task);
        t.mine = 0;
      }
      t.at = At::kAwait;
      return true;
    default:
      return false;
  }
}

} // namespace model
