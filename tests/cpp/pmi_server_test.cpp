// PmiServer against a store in this process; each test plays MPI at the other end of the socket.
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <sys/socket.h>

#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include "base/deadline.h"
#include "check.h"
#include "launch/pmi_server.h"

using namespace torch_rpc_mpi;

namespace {

constexpr const char* kInitialized = "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0";
constexpr const char* kPassed = "cmd=barrier_out rc=0";

std::string ask(const PmiServer& server, const std::string& text) {
  send(server.clientSocket(), text.data(), text.size(), MSG_NOSIGNAL);
  std::string answer;
  char character = 0;
  while (recv(server.clientSocket(), &character, 1, 0) == 1 && character != '\n') {
    answer += character;
  }
  return answer;
}

std::vector<std::unique_ptr<PmiServer>> servers(
    int size,
    std::chrono::milliseconds timeout = std::chrono::seconds(60)) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  const auto companions = std::make_shared<Companions>(std::vector<Companions::Member>());
  std::vector<std::unique_ptr<PmiServer>> all;
  for (int rank = 0; rank < size; ++rank) {
    all.push_back(
        std::make_unique<PmiServer>(store, PmiPlace{rank, size, "world-7", "(vector,(0,1,2))"}, timeout, companions));
  }
  return all;
}

} // namespace

TEST(pmi_server_tells_of_the_world) {
  const auto all = servers(3);
  const PmiServer& server = *all[2];
  CHECK_EQUAL(ask(server, "cmd=init pmi_version=1 pmi_subversion=1\n"), kInitialized);
  CHECK_EQUAL(ask(server, "cmd=get_my_kvsname\n"), "cmd=my_kvsname rc=0 kvsname=world-7");
  CHECK_EQUAL(ask(server, "cmd=get_universe_size\n"), "cmd=universe_size rc=0 size=3");
  CHECK_EQUAL(ask(server, "cmd=get_appnum\n"), "cmd=appnum rc=0 appnum=0");
  CHECK_EQUAL(
      ask(server, "cmd=get kvsname=world-7 key=PMI_process_mapping\n"),
      "cmd=get_result rc=0 msg=success value=(vector,(0,1,2))");
  CHECK_EQUAL(ask(server, "cmd=finalize\n"), "cmd=finalize_ack rc=0");
}

TEST(pmi_server_gives_after_a_barrier_what_others_put) {
  const auto all = servers(2, durationOf<std::chrono::milliseconds>(1e300)); // a limit that nobody reaches
  CHECK_EQUAL(ask(*all[0], "cmd=put kvsname=world-7 key=card value=a#b=c d\n"), "cmd=put_result rc=0 msg=success");
  std::string first;
  std::thread other([&] { first = ask(*all[0], "cmd=barrier_in\n"); });
  const std::string second = ask(*all[1], "cmd=barrier_in\n");
  other.join();
  CHECK_EQUAL(first, kPassed);
  CHECK_EQUAL(second, kPassed);
  CHECK_EQUAL(ask(*all[1], "cmd=get kvsname=world-7 key=card\n"), "cmd=get_result rc=0 msg=success value=a#b=c d");
  CHECK_EQUAL(
      ask(*all[1], "cmd=get kvsname=world-7 key=missing\n"), "cmd=get_result rc=-1 msg=key_not_found value=unknown");
}

TEST(pmi_server_takes_lines_in_pieces_and_several_at_once) {
  const auto all = servers(1);
  const PmiServer& server = *all[0];
  const std::string begin = "cmd=get_ap";
  send(server.clientSocket(), begin.data(), begin.size(), 0);
  CHECK_EQUAL(ask(server, "pnum\ncmd=get_universe_size\n"), "cmd=appnum rc=0 appnum=0");
  CHECK_EQUAL(ask(server, ""), "cmd=universe_size rc=0 size=1");
}

TEST(pmi_server_answers_what_it_cannot_do) {
  const auto all = servers(1);
  const PmiServer& server = *all[0];
  CHECK_EQUAL(ask(server, "cmd=publish_name service=a port=b\n"), "cmd=publish_name_result rc=-1 msg=not_supported");
  CHECK_EQUAL(ask(server, "mcmd=spawn\nnprocs=1\nexecname=a\nendcmd\n"), "cmd=spawn_result rc=-1 msg=not_supported");
  CHECK_EQUAL(ask(server, "cmd=put kvsname=world-7\n"), "cmd=error rc=-1 msg=failed");
  CHECK_EQUAL(ask(server, "cmd=init\n"), kInitialized); // and goes on
}

TEST(pmi_server_does_not_wait_for_ever_at_a_barrier) {
  const auto all = servers(2, std::chrono::milliseconds(20));
  CHECK_EQUAL(ask(*all[0], "cmd=barrier_in\n"), "cmd=error rc=-1 msg=failed");
}

TEST(pmi_server_hangs_up_when_stopped) {
  const auto all = servers(1);
  all[0]->stop();
  CHECK_EQUAL(ask(*all[0], "cmd=init\n"), "");
  all[0]->stop(); // again
}
