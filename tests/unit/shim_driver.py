"""Drives one MPI shim through ctypes, as a world of one; run by test_mpi_shims.py.

Usage: shim_driver.py mpi4py PACKAGE_DIRECTORY | standard PACKAGE_DIRECTORY LIBRARY | foreign PACKAGE_DIRECTORY
"""

import ctypes
import sys
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_size_t, c_ssize_t, c_uint32, c_void_p
from pathlib import Path

Handle = c_size_t


class Status(ctypes.Structure):
    _fields_ = [
        ("source", c_int),
        ("tag", c_int),
        ("error", c_int),
        ("cancelled", c_int),
        ("bytes", c_size_t),
    ]


def _function(*arguments: type) -> type:
    return CFUNCTYPE(c_int, *arguments)


_FLAG = _function(POINTER(c_int))
_COMM_TO_INT = _function(Handle, POINTER(c_int))
_TRANSFER = _function(c_void_p, c_size_t, c_int, c_int, Handle, POINTER(Handle))


class Table(ctypes.Structure):
    """struct trm_mpi_table of csrc/mpi/mpi_table.h."""

    _fields_ = [
        ("version", c_uint32),
        ("abi_name", c_char_p),
        ("comm_null", Handle),
        ("request_null", Handle),
        ("initialized", _FLAG),
        ("finalized", _FLAG),
        ("query_thread", _FLAG),
        ("init_thread", _function(c_int, POINTER(c_int))),
        ("get_library_version", _function(c_char_p, c_size_t)),
        ("error_string", _function(c_int, c_char_p, c_size_t)),
        ("comm_from_int", _function(c_ssize_t, POINTER(Handle))),
        ("comm_to_int", _function(Handle, POINTER(c_ssize_t))),
        ("comm_rank", _COMM_TO_INT),
        ("comm_size", _COMM_TO_INT),
        ("comm_test_inter", _COMM_TO_INT),
        ("comm_idup", _function(Handle, POINTER(Handle), POINTER(Handle))),
        ("comm_free", _function(POINTER(Handle))),
        ("comm_create_group", _function(Handle, c_int, POINTER(c_int), c_int, POINTER(Handle))),
        ("comm_set_errors_return", _function(Handle)),
        ("comm_abort", _function(Handle, c_int)),
        ("isend", _TRANSFER),
        ("try_isend", _function(c_void_p, c_size_t, c_int, c_int, Handle, POINTER(Handle), POINTER(c_int))),
        ("irecv", _TRANSFER),
        ("test", _function(POINTER(Handle), POINTER(c_int), POINTER(Status))),
        ("testsome", _function(c_int, POINTER(Handle), POINTER(c_int), POINTER(c_int), POINTER(Status))),
        ("cancel", _function(POINTER(Handle))),
        ("request_free", _function(POINTER(Handle))),
        ("iprobe", _function(c_int, c_int, Handle, POINTER(c_int), POINTER(Status))),
        ("iallgather", _function(c_void_p, c_void_p, c_size_t, Handle, POINTER(Handle))),
        (
            "ialltoallv",
            _function(
                c_void_p,
                POINTER(c_int),
                POINTER(c_int),
                c_void_p,
                POINTER(c_int),
                POINTER(c_int),
                Handle,
                POINTER(Handle),
            ),
        ),
    ]


def open_table(package: Path, abi: str, library: ctypes.CDLL) -> tuple[Table | None, str]:
    """Return the table of one shim for `library`, or None and the shim's reason."""
    entry = ctypes.CDLL(str(package / f"_mpi_shim_{abi}.so")).torch_rpc_mpi_open_table
    entry.restype = POINTER(Table)
    entry.argtypes = [c_void_p, c_char_p, c_size_t]
    reason = ctypes.create_string_buffer(256)
    table = entry(library._handle, reason, len(reason))
    return (table.contents if table else None), reason.value.decode()


def check(code: int) -> None:
    assert code == 0, code


def ask(function, *arguments) -> int:
    """Call a table function whose last parameter is an int to fill."""
    answer = c_int(-1)
    check(function(*arguments, byref(answer)))
    return answer.value


def library_version(table: Table) -> bytes:
    version = ctypes.create_string_buffer(8192)
    check(table.get_library_version(version, len(version)))
    return version.value


def check_environment(table: Table) -> None:
    assert table.version == 3
    assert ask(table.initialized) == 1
    assert ask(table.finalized) == 0
    assert ask(table.query_thread) == 3
    version = library_version(table)
    print(version.decode().splitlines()[0])
    cut = ctypes.create_string_buffer(b"#" * 8, 8)
    check(table.get_library_version(cut, 5))
    assert cut.raw == version[:4] + b"\0###"
    text = ctypes.create_string_buffer(512)
    check(table.error_string(1, text, len(text)))
    assert text.value


def complete(table: Table, request: Handle, status: Status) -> None:
    flag = c_int()
    while not flag.value:
        check(table.test(byref(request), byref(flag), byref(status)))


def duplicate(table: Table, world: Handle) -> Handle:
    comm, request, status = Handle(), Handle(), Status()
    check(table.comm_idup(world, byref(comm), byref(request)))
    complete(table, request, status)
    assert request.value == table.request_null
    assert comm.value not in (table.comm_null, world.value)
    check(table.comm_set_errors_return(comm))
    assert (ask(table.comm_rank, comm), ask(table.comm_size, comm)) == (0, 1)
    assert ask(table.comm_test_inter, comm) == 0
    number, again = c_ssize_t(), Handle()
    check(table.comm_to_int(comm, byref(number)))
    check(table.comm_from_int(number, byref(again)))
    assert again.value == comm.value
    return comm


def check_group(table: Table, comm: Handle) -> None:
    made = Handle()
    check(table.comm_create_group(comm, 1, (c_int * 1)(0), 5, byref(made)))
    assert ask(table.comm_size, made) == 1
    check(table.comm_free(byref(made)))
    assert made.value == table.comm_null


def check_single_transfer(table: Table, comm: Handle) -> None:
    source, target = ctypes.create_string_buffer(b"abcdef"), ctypes.create_string_buffer(64)
    send, receive, status, probed = Handle(), Handle(), Status(), Status()
    check(table.isend(source, 6, 0, 11, comm, byref(send)))
    flag = c_int()
    while not flag.value:
        check(table.iprobe(-1, 11, comm, byref(flag), byref(probed)))
    assert (probed.source, probed.tag, probed.bytes) == (0, 11, 6)
    check(table.irecv(target, 64, -1, 11, comm, byref(receive)))
    complete(table, receive, status)
    assert (status.source, status.tag, status.error, status.cancelled, status.bytes) == (0, 11, 0, 0, 6)
    assert target.value == b"abcdef"
    assert receive.value == table.request_null
    complete(table, send, status)
    check(table.test(byref(send), byref(flag), byref(status)))
    assert (flag.value, status.source) == (1, -1), "a null request is complete, from any source"


def check_cancel(table: Table, comm: Handle) -> None:
    target, receive, status = ctypes.create_string_buffer(8), Handle(), Status()
    check(table.irecv(target, 8, 0, 12, comm, byref(receive)))
    check(table.cancel(byref(receive)))
    complete(table, receive, status)
    assert status.cancelled
    assert receive.value == table.request_null


def collect(table: Table, requests: ctypes.Array) -> dict[int, Status]:
    """Complete all of `requests`; return their statuses by index."""
    count = len(requests)
    pending = sum(request != table.request_null for request in requests)
    done: dict[int, Status] = {}
    while len(done) < pending:
        completed, indices, statuses = c_int(-1), (c_int * count)(), (Status * count)()
        check(table.testsome(count, requests, byref(completed), indices, statuses))
        for i in range(completed.value):
            assert indices[i] not in done
            assert requests[indices[i]] == table.request_null
            done[indices[i]] = Status.from_buffer_copy(statuses[i])
    return done


def check_testsome(table: Table, comm: Handle) -> None:
    """More requests than one batch of the shim, null ones among them, and one receive that is too short."""
    count, short = 300, 257
    if table.abi_name == b"standard" and b"Intel" in library_version(table):
        short = 0  # its libmpi_abi (2021.18) ends the process on one, whatever the error handler; none is posted for 0
    sources = [ctypes.create_string_buffer(bytes([i % 251]) * i, max(i, 1)) for i in range(count)]
    targets = [ctypes.create_string_buffer(i if i != short else 3) for i in range(count)]
    receives, sends = (Handle * count)(), (Handle * count)()
    for i in range(count):
        receives[i] = sends[i] = table.request_null
    completed, indices, statuses = c_int(-1), (c_int * count)(), (Status * count)()
    check(table.testsome(count, receives, byref(completed), indices, statuses))
    assert completed.value == 0, "all null"
    check(table.testsome(0, receives, byref(completed), indices, statuses))
    assert completed.value == 0, "none"

    posted = [i for i in range(1, count) if i % 7]
    request = Handle()
    for i in posted:
        check(table.irecv(targets[i], len(targets[i]), 0, i, comm, byref(request)))
        receives[i] = request.value
    for i in posted:
        check(table.isend(sources[i], i, 0, i, comm, byref(request)))
        sends[i] = request.value
    done = collect(table, receives)
    assert sorted(done) == posted
    for i, status in done.items():
        assert (status.source, status.tag) == (0, i)
        if i != short:
            assert status.error == 0
            assert status.bytes == i
            assert targets[i].raw == sources[i].raw[:i]
    # Open MPI 5.0 cuts a message from the same process without an error; MPICH says MPI_ERR_TRUNCATE.
    if short and (done[short].error or table.abi_name != b"openmpi"):
        text = ctypes.create_string_buffer(512)
        check(table.error_string(done[short].error, text, len(text)))
        assert b"trunc" in text.value.lower(), text.value
    collect(table, sends)


def check_collectives(table: Table, comm: Handle) -> None:
    target, request, status = ctypes.create_string_buffer(4), Handle(), Status()
    check(table.iallgather(b"abcd", target, 4, comm, byref(request)))
    complete(table, request, status)
    assert target.raw == b"abcd"
    two, one, zero = (c_int * 1)(2), (c_int * 1)(1), (c_int * 1)(0)
    check(table.ialltoallv(b"wxyz", two, one, target, two, zero, comm, byref(request)))
    complete(table, request, status)
    assert target.raw == b"xycd"


def check_everything(table: Table, world_number: int) -> None:
    check_environment(table)
    world = Handle()
    check(table.comm_from_int(world_number, byref(world)))
    comm = duplicate(table, world)
    check_group(table, comm)
    check_single_transfer(table, comm)
    check_cancel(table, comm)
    check_testsome(table, comm)
    check_collectives(table, comm)
    check(table.comm_free(byref(comm)))
    assert comm.value == table.comm_null
    print("ok")


def run_mpi4py(package: Path) -> None:
    from mpi4py import MPI

    standard = hasattr(MPI, "Get_abi_version") and MPI.Get_abi_version()[0] > 0
    abi = "standard" if standard else "openmpi" if MPI._sizeof(MPI.Comm) == 8 else "mpich"
    library = ctypes.CDLL(MPI.__file__)
    table, reason = open_table(package, abi, library)
    assert table is not None, reason
    assert table.abi_name == abi.encode()
    again, reason = open_table(package, abi, library)
    assert again is not None, reason
    world = MPI.COMM_WORLD
    check_everything(table, world.handle if standard else world.py2f())


def run_standard(package: Path, path: str) -> None:
    library = ctypes.CDLL(path)
    table, reason = open_table(package, "standard", library)
    assert table is not None, reason
    assert ask(table.initialized) == 0
    assert ask(table.init_thread, 3) == 3
    comm_world_of_the_standard_abi = 0x101
    # MPICH raises what MPI_Testsome finds on the world, where mpi4py would have set this already.
    check(table.comm_set_errors_return(comm_world_of_the_standard_abi))
    check_everything(table, comm_world_of_the_standard_abi)
    check(library.MPI_Finalize())
    assert ask(table.finalized) == 1


def run_foreign(package: Path) -> None:
    for abi in ("mpich", "openmpi", "standard"):
        table, reason = open_table(package, abi, ctypes.CDLL("libc.so.6"))
        assert table is None
        print(f"{abi}: {reason}")


if __name__ == "__main__":
    mode, package_directory, *rest = sys.argv[1:]
    run = {"mpi4py": run_mpi4py, "standard": run_standard, "foreign": run_foreign}[mode]
    run(Path(package_directory), *rest)
