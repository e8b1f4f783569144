// Visits every state that a model can come to, however its actors' steps interleave.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace model {

// What exploring came to. Without a violation the model holds.
struct Outcome {
  size_t states = 0;
  std::string violation;
  std::vector<std::string> trace; // the steps that lead there, one of the shortest ways
};

// A model has
//   State                                      of unique representation: states are compared and hashed as bytes;
//   State initial() const;
//   int actors() const;
//   bool step(State&, int actor, int choice);  false: the actor cannot take a step now, or not that one;
//   int choices() const;                       how many outcomes the step tried last can have;
//   const char* violation() const;             what it broke, or null;
//   std::string name(int actor) const;         of the step tried last;
//   bool finished(const State&) const;         all that was to be done is done;
//   int unnoticed(const State&) const;         an actor whose next step no other can notice or prevent, or -1: such a
//                                              step is taken first, since all orders with the others come to the same;
//   State canonical(const State&) const;       the one of the states that differ only in which of several like actors
//                                              is where.
//
// A step that breaks something is a violation, and so is a state from which no steps lead to a finished one: either
// nobody can take a step there, or those that can go round for ever. The second demands no more than that a thread
// which could go on again and again goes on at last.
template <class Model>
class Explorer {
 public:
  using State = typename Model::State;
  static_assert(std::has_unique_object_representations_v<State>);

  explicit Explorer(Model& model) : model_(model) {}

  Outcome explore() {
    insert(model_.canonical(model_.initial()), 0);
    for (uint32_t from = 0; from < states_.size(); ++from) {
      const size_t edgesBefore = edges_.size();
      if (!visit(from)) {
        return outcome(from, violation_, true);
      }
      if (edges_.size() == edgesBefore && !model_.finished(states_[from])) {
        return outcome(from, "nobody can take a step, and not all is done", false);
      }
    }
    const uint32_t lost = firstOfNoReturn();
    if (lost < states_.size()) {
      return outcome(lost, "what is left to do cannot be done any more, whatever is run", false);
    }
    return {states_.size(), "", {}};
  }

 private:
  struct Edge {
    uint32_t from, to;
  };

  // Takes every step that can be taken; false when one breaks something.
  bool visit(uint32_t from) {
    const int only = model_.unnoticed(states_[from]);
    for (int actor = std::max(only, 0); actor < (only < 0 ? model_.actors() : only + 1); ++actor) {
      int choice = 0;
      do {
        State next = states_[from];
        const bool taken = model_.step(next, actor, choice);
        if (taken && model_.violation() != nullptr) {
          violation_ = model_.violation();
          return false;
        }
        if (taken) {
          edges_.push_back({from, insert(model_.canonical(next), from)});
        }
      } while (++choice < model_.choices());
    }
    return true;
  }

  static std::string_view bytes(const State& state) {
    return {reinterpret_cast<const char*>(&state), sizeof(State)};
  }

  uint32_t insert(const State& state, uint32_t from) {
    if (states_.size() * 2 >= table_.size()) {
      grow();
    }
    size_t slot = std::hash<std::string_view>()(bytes(state)) & (table_.size() - 1);
    for (; table_[slot] != kFree; slot = (slot + 1) & (table_.size() - 1)) {
      if (std::memcmp(&states_[table_[slot]], &state, sizeof(State)) == 0) {
        return table_[slot];
      }
    }
    table_[slot] = static_cast<uint32_t>(states_.size());
    states_.push_back(state);
    parents_.push_back(from);
    return table_[slot];
  }

  void grow() {
    table_.assign(table_.empty() ? size_t{1} << 16 : table_.size() * 2, kFree);
    for (uint32_t index = 0; index < states_.size(); ++index) {
      size_t slot = std::hash<std::string_view>()(bytes(states_[index])) & (table_.size() - 1);
      while (table_[slot] != kFree) {
        slot = (slot + 1) & (table_.size() - 1);
      }
      table_[slot] = index;
    }
  }

  // The first state visited that no finished one can be reached from, or their number. Goes the edges backwards.
  uint32_t firstOfNoReturn() const {
    std::vector<uint32_t> begin(states_.size() + 1, 0);
    for (const Edge& edge : edges_) {
      ++begin[edge.to + 1];
    }
    for (size_t i = 1; i < begin.size(); ++i) {
      begin[i] += begin[i - 1];
    }
    std::vector<uint32_t> sources(edges_.size());
    std::vector<uint32_t> filled(begin.begin(), begin.end() - 1);
    for (const Edge& edge : edges_) {
      sources[filled[edge.to]++] = edge.from;
    }
    std::vector<bool> returns(states_.size(), false);
    std::vector<uint32_t> open;
    for (uint32_t index = 0; index < states_.size(); ++index) {
      if (model_.finished(states_[index])) {
        returns[index] = true;
        open.push_back(index);
      }
    }
    while (!open.empty()) {
      const uint32_t to = open.back();
      open.pop_back();
      for (uint32_t i = begin[to]; i < begin[to + 1]; ++i) {
        if (!returns[sources[i]]) {
          returns[sources[i]] = true;
          open.push_back(sources[i]);
        }
      }
    }
    uint32_t index = 0;
    while (index < states_.size() && returns[index]) {
      ++index;
    }
    return index;
  }

  Outcome outcome(uint32_t at, std::string violation, bool inNextStep) {
    Outcome result{states_.size(), std::move(violation), {}};
    std::vector<uint32_t> way;
    for (uint32_t index = at; index != 0; index = parents_[index]) {
      way.insert(way.begin(), index);
    }
    // Taken again from the initial state, so that each actor keeps its number.
    State state = model_.initial();
    for (const uint32_t to : way) {
      result.trace.push_back(takeStep(state, [&] {
        const State next = model_.canonical(state);
        return std::memcmp(&next, &states_[to], sizeof(State)) == 0;
      }));
    }
    if (inNextStep) {
      result.trace.push_back(takeStep(state, [&] { return model_.violation() != nullptr; }));
    }
    return result;
  }

  // Some step after which `reached` holds; its name.
  template <class Reached>
  std::string takeStep(State& state, Reached reached) {
    const State from = state;
    for (int actor = 0; actor < model_.actors(); ++actor) {
      int choice = 0;
      do {
        state = from;
        if (model_.step(state, actor, choice) && reached()) {
          return model_.name(actor);
        }
      } while (++choice < model_.choices());
    }
    return "?";
  }

  static constexpr uint32_t kFree = UINT32_MAX;

  Model& model_;
  std::vector<State> states_;
  std::vector<uint32_t> parents_; // of each state: the one that it was first reached from
  std::vector<uint32_t> table_;   // hash table of indices into states_
  std::vector<Edge> edges_;
  std::string violation_;
};

} // namespace model
