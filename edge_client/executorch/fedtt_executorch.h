/* The training step in ExecuTorch behind eight C functions: what a Python client loads with ctypes, and what an
 * app links (Swift and Kotlin Native read this header as it is).
 *
 * A program is one `.pte` file with the method `forward`; its weights lie in a `.ptd` file that all programs of
 * a bundle share. Programs are independent; one program must not be used by two threads at once.
 *
 * Load trusted programs alone: those whose sha256 a trusted manifest names. A changed one may abort the process, as
 * the runtime checks less than it reads.
 */
#ifndef FEDTT_EXECUTORCH_H
#define FEDTT_EXECUTORCH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FEDTT_PUBLIC __attribute__((visibility("default")))
#define FEDTT_EXECUTORCH_ABI 1 /* raised whenever a caller built for the old functions would break */
#define FEDTT_MOST_DIMENSIONS 8

typedef struct fedtt_program fedtt_program;

/* Element types by ExecuTorch's own numbers. */
enum fedtt_type { FEDTT_INT32 = 3, FEDTT_INT64 = 4, FEDTT_FLOAT32 = 6 };

typedef struct {
  void* data; /* of an input: read, never written. Of an output: the program's, valid until it runs again */
  int32_t type;
  int32_t dimensions;
  int32_t sizes[FEDTT_MOST_DIMENSIONS];
} fedtt_tensor;

FEDTT_PUBLIC int32_t fedtt_abi(void);
FEDTT_PUBLIC const char* fedtt_executorch_version(void); /* as "1.5.1": of the SDK this library was built with */

/* How many threads programs may use, all together; 1 unless set before the first is loaded,
 * and where they cannot be had. Not while a program runs: the pool they wait in is replaced. */
FEDTT_PUBLIC void fedtt_set_threads(uint32_t threads);

/* Load a program; weights may be NULL. NULL where it cannot be had: then `error` says why, in one line. */
FEDTT_PUBLIC fedtt_program* fedtt_load(const char* program, const char* weights, char* error, size_t error_bytes);
FEDTT_PUBLIC void fedtt_free(fedtt_program* program);

FEDTT_PUBLIC int32_t fedtt_output_count(const fedtt_program* program);

/* Run it; 0, or an error's number, then `error` says why in one line and the program can be run again. */
FEDTT_PUBLIC int32_t fedtt_run(
    fedtt_program* program, const fedtt_tensor* inputs, int32_t count, char* error, size_t error_bytes);

/* One output of the last run. */
FEDTT_PUBLIC int32_t fedtt_output(const fedtt_program* program, int32_t index, fedtt_tensor* found);

#ifdef __cplusplus
}
#endif
#endif
