#include "mpi/shim/retries.h"

#include "mpi/shim/find_call.h"

/* Some milliseconds where there is no room, 0.1 s where there is no connection: each repetition then tries to make it.
 */
static const int kMostRetries = 5000;
static const int kForEver = -1;

/* In all ABIs handles of variables are pointers. */
typedef struct variable* cvar_handle;
static cvar_handle variable; /* NULL: there is nothing to bound */
static int (*write_variable)(cvar_handle handle, const void* value);

void retries_find(void* library) {
  int (*init_thread)(int required, int* provided);
  int (*get_index)(const char* name, int* index);
  int (*handle_alloc)(int index, void* object, cvar_handle* handle, int* count);
  int (*read_variable)(cvar_handle handle, void* value);
  if (!find_call(library, "MPI_T_init_thread", &init_thread) ||
      !find_call(library, "MPI_T_cvar_get_index", &get_index) ||
      !find_call(library, "MPI_T_cvar_handle_alloc", &handle_alloc) ||
      !find_call(library, "MPI_T_cvar_read", &read_variable) ||
      !find_call(library, "MPI_T_cvar_write", &write_variable))
    return;
  int provided = 0;
  int index = 0;
  int count = 0;
  int value = 0;
  cvar_handle found = NULL;
  /* Never finalised: its counterpart would have to come before MPI_Finalize, which is the user's. */
  if (init_thread(0, &provided) || get_index("MPIR_CVAR_CH4_OFI_MAX_EAGAIN_RETRY", &index) ||
      handle_alloc(index, NULL, &found, &count) || count != 1 || read_variable(found, &value) || value > 0)
    return;
  variable = found;
}

void retries_bound(void) {
  if (variable)
    write_variable(variable, &kMostRetries);
}

void retries_restore(void) {
  if (variable)
    write_variable(variable, &kForEver);
}
