/* How often MPI itself repeats what it cannot post at once.
 *
 * MPICH over libfabric repeats a send inside MPI_Isend for as long as the provider has no room for it, or no
 * connection: to a process that has died, for ever. Its control variable MPIR_CVAR_CH4_OFI_MAX_EAGAIN_RETRY bounds
 * that; the call then ends with an error of class MPIX_ERR_EAGAIN. It is set for the length of a call alone, through
 * the tools interface (MPI-4.1 section 15.3): MPI_Init and the user's own traffic rely on the repetitions.
 * What the user's threads send over libfabric in that moment is bounded as well.
 *
 * Not thread-safe: for the thread that holds the progress token. */
#ifndef TORCH_RPC_MPI_RETRIES_H
#define TORCH_RPC_MPI_RETRIES_H

/* Looks for the variable, once, when MPI is initialised; where there is none, or the user has set it, the others do
 * nothing. */
void retries_find(void* library);
void retries_bound(void);
void retries_restore(void);

#endif
