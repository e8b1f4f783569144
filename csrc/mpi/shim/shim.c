/* One MPI ABI behind the neutral table of mpi_table.h. Compiled once per ABI with TRM_ABI_HEADER naming its abi_*.h.
 *
 * Nothing here links to MPI: every function, and in Open MPI every predefined handle, is looked up in the library
 * handle that the extension passes, so that exactly the MPI which mpi4py uses is used. The looked-up pointers are
 * written once, by the first successful open, and only read afterwards; apart from them there is no state, so the
 * table may be called from any thread that MPI allows to call. */
#include "mpi/mpi_table.h"

#include TRM_ABI_HEADER
#include "mpi/shim/calls.h"
#include "mpi/shim/find_call.h"
#include "mpi/shim/retries.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

/* The largest MPI_MAX_ERROR_STRING and MPI_MAX_LIBRARY_VERSION_STRING of the three ABIs. */
#define TEXT_CAPACITY 8192

/* How many requests one MPI_Testsome sees: bounds the stack, and no allocation is needed in the progress loop. */
#define TESTSOME_BATCH 128

#define DECLARE_CALL(result, name, parameters) result(*name) parameters;
struct mpi_library {
  MPI_CALLS(DECLARE_CALL)
  abi_comm comm_null;
  abi_request request_null;
  abi_datatype byte;
  abi_errhandler errors_return;
};

static struct mpi_library mpi;
static void* opened; /* the handle through which it was found */

static trm_handle from_comm(abi_comm comm) {
  return (trm_handle)(abi_bits)comm;
}
static abi_comm to_comm(trm_handle handle) {
  return (abi_comm)(abi_bits)handle;
}
static trm_handle from_request(abi_request request) {
  return (trm_handle)(abi_bits)request;
}
static abi_request to_request(trm_handle handle) {
  return (abi_request)(abi_bits)handle;
}

/* ---- environment ---- */

static const int kThreadLevels[] = {ABI_THREAD_SINGLE, ABI_THREAD_FUNNELED, ABI_THREAD_SERIALIZED, ABI_THREAD_MULTIPLE};

static int to_thread_level(int abi_level) {
  int level = TRM_THREAD_MULTIPLE;
  while (level > TRM_THREAD_SINGLE && kThreadLevels[level] > abi_level)
    --level;
  return level;
}

static int shim_initialized(int* flag) {
  return mpi.Initialized(flag);
}

static int shim_finalized(int* flag) {
  return mpi.Finalized(flag);
}

static int shim_query_thread(int* level) {
  int provided = ABI_THREAD_SINGLE;
  int rc = mpi.Query_thread(&provided);
  *level = to_thread_level(provided);
  return rc;
}

static int shim_init_thread(int required, int* provided_level) {
  int provided = ABI_THREAD_SINGLE;
  int rc = mpi.Init_thread(NULL, NULL, kThreadLevels[required], &provided);
  *provided_level = to_thread_level(provided);
  return rc;
}

static int shim_get_library_version(char* text, size_t capacity) {
  char full[TEXT_CAPACITY] = "";
  int length = 0;
  int rc = mpi.Get_library_version(full, &length);
  snprintf(text, capacity, "%s", full);
  return rc;
}

static int shim_error_string(int code, char* text, size_t capacity) {
  char full[TEXT_CAPACITY] = "";
  int length = 0;
  int rc = mpi.Error_string(code, full, &length);
  snprintf(text, capacity, "%s", full);
  return rc;
}

/* ---- communicators ---- */

static int shim_comm_from_int(intptr_t value, trm_handle* comm) {
  abi_comm found = ABI_COMM_FROM_INT(value);
  *comm = from_comm(found ? found : mpi.comm_null); /* Open MPI answers NULL to an integer it does not know. */
  return 0;
}

static int shim_comm_to_int(trm_handle comm, intptr_t* value) {
  *value = ABI_COMM_TO_INT(to_comm(comm));
  return 0;
}

static int shim_comm_rank(trm_handle comm, int* rank) {
  return mpi.Comm_rank(to_comm(comm), rank);
}

static int shim_comm_size(trm_handle comm, int* size) {
  return mpi.Comm_size(to_comm(comm), size);
}

static int shim_comm_test_inter(trm_handle comm, int* flag) {
  return mpi.Comm_test_inter(to_comm(comm), flag);
}

static int shim_comm_free(trm_handle* comm) {
  abi_comm own = to_comm(*comm);
  int rc = mpi.Comm_free(&own);
  *comm = from_comm(own);
  return rc;
}

static int create_from_group(abi_comm comm, abi_group all, int count, const int* ranks, int tag, abi_comm* newcomm) {
  abi_group members;
  int rc = mpi.Group_incl(all, count, ranks, &members);
  if (rc)
    return rc;
  rc = mpi.Comm_create_group(comm, members, tag, newcomm);
  mpi.Group_free(&members);
  return rc;
}

static int shim_comm_create_group(trm_handle comm, int count, const int* ranks, int tag, trm_handle* newcomm) {
  abi_comm made = mpi.comm_null;
  abi_group all;
  int rc = mpi.Comm_group(to_comm(comm), &all);
  if (!rc) {
    rc = create_from_group(to_comm(comm), all, count, ranks, tag, &made);
    mpi.Group_free(&all);
  }
  *newcomm = from_comm(made);
  return rc;
}

static int shim_comm_set_errors_return(trm_handle comm) {
  return mpi.Comm_set_errhandler(to_comm(comm), mpi.errors_return);
}

static int shim_comm_abort(trm_handle comm, int code) {
  return mpi.Abort(to_comm(comm), code);
}

/* ---- statuses ---- */

/* For MPI to fill. With an error it need not: the source is then no rank, and not rank 0. */
static abi_status unknown_status(void) {
  abi_status status = {0};
  status.source = ABI_ANY_SOURCE;
  return status;
}

static void read_status(const abi_status* from, int error, struct trm_status* to) {
  int count = 0;
  int cancelled = 0;
  mpi.Get_count(from, mpi.byte, &count);
  mpi.Test_cancelled(from, &cancelled);
  to->source = from->source == ABI_ANY_SOURCE ? TRM_ANY_SOURCE : from->source;
  to->tag = from->tag;
  to->error = error;
  to->cancelled = cancelled;
  to->bytes = count > 0 ? (size_t)count : 0; /* A completed send has no count; some libraries answer MPI_UNDEFINED. */
}

/* ---- point to point ---- */

static int shim_isend(const void* data, size_t bytes, int dest, int tag, trm_handle comm, trm_handle* request) {
  abi_request own = mpi.request_null;
  int rc = mpi.Isend(data, (int)bytes, mpi.byte, dest, tag, to_comm(comm), &own);
  *request = from_request(own);
  return rc;
}

/* Result codes may carry more than their class (MPICH), so the class decides. */
static int is_of_class(int rc, int wanted) {
  int error_class = rc;
  if (rc)
    mpi.Error_class(rc, &error_class);
  return error_class == wanted;
}

static int shim_try_isend(
    const void* data,
    size_t bytes,
    int dest,
    int tag,
    trm_handle comm,
    trm_handle* request,
    int* posted) {
#ifdef ABI_ERR_EAGAIN
  static int looked = 0;
  if (!looked) {
    retries_find(opened);
    looked = 1;
  }
  retries_bound();
  int rc = shim_isend(data, bytes, dest, tag, comm, request);
  retries_restore();
  *posted = !rc || !is_of_class(rc, ABI_ERR_EAGAIN);
  return *posted ? rc : 0;
#else
  *posted = 1;
  return shim_isend(data, bytes, dest, tag, comm, request);
#endif
}

static int shim_irecv(void* data, size_t bytes, int source, int tag, trm_handle comm, trm_handle* request) {
  abi_request own = mpi.request_null;
  int from = source == TRM_ANY_SOURCE ? ABI_ANY_SOURCE : source;
  int rc = mpi.Irecv(data, (int)bytes, mpi.byte, from, tag, to_comm(comm), &own);
  *request = from_request(own);
  return rc;
}

static int shim_test(trm_handle* request, int* flag, struct trm_status* status) {
  abi_request own = to_request(*request);
  abi_status found = unknown_status();
  int rc = mpi.Test(&own, flag, &found);
  *request = from_request(own);
  if (rc || *flag)
    read_status(&found, rc, status); /* A single completion reports its error as the result, not in the status. */
  return rc;
}

static int testsome_batch(int count, trm_handle* requests, int* out_count, int* indices, struct trm_status* statuses) {
  abi_request own[TESTSOME_BATCH];
  abi_status found[TESTSOME_BATCH];
  for (int i = 0; i < count; ++i) {
    own[i] = to_request(requests[i]);
    found[i].source = ABI_ANY_SOURCE; /* as in unknown_status() */
  }
  int rc = mpi.Testsome(count, own, out_count, indices, found);
  int in_status = is_of_class(rc, ABI_ERR_IN_STATUS);
  if (*out_count == ABI_UNDEFINED || (rc && !in_status))
    *out_count = 0;
  for (int i = 0; i < *out_count; ++i) {
    requests[indices[i]] = from_request(own[indices[i]]);
    /* Only with MPI_ERR_IN_STATUS is the error field of a status defined. */
    read_status(&found[i], in_status ? found[i].error : 0, &statuses[i]);
  }
  return in_status ? 0 : rc;
}

static int shim_testsome(int count, trm_handle* requests, int* out_count, int* indices, struct trm_status* statuses) {
  int rc = 0;
  int total = 0;
  for (int base = 0; base < count && !rc; base += TESTSOME_BATCH) {
    int size = count - base < TESTSOME_BATCH ? count - base : TESTSOME_BATCH;
    int completed = 0;
    rc = testsome_batch(size, requests + base, &completed, indices + total, statuses + total);
    for (int i = total; i < total + completed; ++i)
      indices[i] += base;
    total += completed;
  }
  *out_count = total;
  return rc;
}

static int shim_cancel(trm_handle* request) {
  abi_request own = to_request(*request);
  int rc = mpi.Cancel(&own);
  *request = from_request(own);
  return rc;
}

static int shim_request_free(trm_handle* request) {
  abi_request own = to_request(*request);
  int rc = mpi.Request_free(&own);
  *request = from_request(own);
  return rc;
}

static int shim_iprobe(int source, int tag, trm_handle comm, int* flag, struct trm_status* status) {
  abi_status found = unknown_status();
  int from = source == TRM_ANY_SOURCE ? ABI_ANY_SOURCE : source;
  int rc = mpi.Iprobe(from, tag, to_comm(comm), flag, &found);
  if (!rc && *flag)
    read_status(&found, 0, status);
  return rc;
}

/* ---- collectives ---- */

/* MPI may write the new communicator to the address it was given as late as when the request completes, so the
 * caller's trm_handle itself is that address (and must stay where it is until then). An MPICH handle fills only its
 * low half, hence the clearing; on a big-endian machine it would be the high half. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "comm_idup fills a trm_handle in place and expects a little-endian machine"
#endif

static int shim_comm_idup(trm_handle comm, trm_handle* newcomm, trm_handle* request) {
  abi_request own = mpi.request_null;
  *newcomm = 0;
  int rc = mpi.Comm_idup(to_comm(comm), (abi_comm*)(void*)newcomm, &own);
  *request = from_request(own);
  return rc;
}

static int shim_iallgather(const void* send, void* recv, size_t bytes_each, trm_handle comm, trm_handle* request) {
  abi_request own = mpi.request_null;
  int count = (int)bytes_each;
  int rc = mpi.Iallgather(send, count, mpi.byte, recv, count, mpi.byte, to_comm(comm), &own);
  *request = from_request(own);
  return rc;
}

static int shim_ialltoallv(
    const void* send,
    const int* send_counts,
    const int* send_offsets,
    void* recv,
    const int* recv_counts,
    const int* recv_offsets,
    trm_handle comm,
    trm_handle* request) {
  abi_request own = mpi.request_null;
  int rc = mpi.Ialltoallv(
      send, send_counts, send_offsets, mpi.byte, recv, recv_counts, recv_offsets, mpi.byte, to_comm(comm), &own);
  *request = from_request(own);
  return rc;
}

/* ---- opening ---- */

static struct trm_mpi_table table = {
    .version = TRM_MPI_TABLE_VERSION,
    .abi_name = ABI_NAME,
    .initialized = shim_initialized,
    .finalized = shim_finalized,
    .query_thread = shim_query_thread,
    .init_thread = shim_init_thread,
    .get_library_version = shim_get_library_version,
    .error_string = shim_error_string,
    .comm_from_int = shim_comm_from_int,
    .comm_to_int = shim_comm_to_int,
    .comm_rank = shim_comm_rank,
    .comm_size = shim_comm_size,
    .comm_test_inter = shim_comm_test_inter,
    .comm_idup = shim_comm_idup,
    .comm_free = shim_comm_free,
    .comm_create_group = shim_comm_create_group,
    .comm_set_errors_return = shim_comm_set_errors_return,
    .comm_abort = shim_comm_abort,
    .isend = shim_isend,
    .try_isend = shim_try_isend,
    .irecv = shim_irecv,
    .test = shim_test,
    .testsome = shim_testsome,
    .cancel = shim_cancel,
    .request_free = shim_request_free,
    .iprobe = shim_iprobe,
    .iallgather = shim_iallgather,
    .ialltoallv = shim_ialltoallv,
};

/* Returns the name of what is missing, or NULL. */
static const char* resolve(void* library, struct mpi_library* found) {
#define FIND_CALL(result, name, parameters)            \
  if (!find_call(library, "MPI_" #name, &found->name)) \
    return "MPI_" #name;
  MPI_CALLS(FIND_CALL)
#define FIND_HANDLE(member, type, source)            \
  found->member = ABI_HANDLE(type, library, source); \
  if (!found->member)                                \
    return #source;
  FIND_HANDLE(comm_null, abi_comm, ABI_COMM_NULL)
  FIND_HANDLE(request_null, abi_request, ABI_REQUEST_NULL)
  FIND_HANDLE(byte, abi_datatype, ABI_BYTE)
  FIND_HANDLE(errors_return, abi_errhandler, ABI_ERRORS_RETURN)
  return NULL;
}

__attribute__((visibility("default"))) const struct trm_mpi_table* torch_rpc_mpi_open_table(
    void* library,
    char* error,
    size_t error_capacity) {
  struct mpi_library found;
  memset(&found, 0, sizeof(found));
  const char* missing = resolve(library, &found);
  if (missing) {
    snprintf(error, error_capacity, "the MPI library lacks %s, which the " ABI_NAME " ABI has", missing);
    return NULL;
  }
  if (!mpi.Initialized) {
    mpi = found;
    opened = library;
    table.comm_null = from_comm(mpi.comm_null);
    table.request_null = from_request(mpi.request_null);
  } else if (memcmp(&mpi, &found, sizeof(mpi)) != 0) {
    snprintf(error, error_capacity, "the " ABI_NAME " shim already serves another MPI library of this process");
    return NULL;
  }
  return &table;
}
