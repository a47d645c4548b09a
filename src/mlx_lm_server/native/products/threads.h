/* Threads that help with one piece of work at a time. */
#pragma once
#include <stddef.h>

#pragma GCC visibility push(hidden)

/* `num_threads` counts the caller; an idle helper spins for `spin_us` and then sleeps. Call once. */
void start_helpers(int num_threads, int spin_us);

/* How many threads may run at once, the caller among them. */
int num_threads(void);

/* Let helpers run `run(work)` beside the caller, who runs it too. The work is a list of blocks from
 * which each takes the next until none is left; it is done when this returns. */
void share_out(void (*run)(void *work), void *work);

/* Below this many multiplications waking a thread costs more than it saves. */
enum { MIN_SHARED_WORK = 400 * 1000 };

/* Memory of the calling thread, at the start of a cache line; it lives until the thread's next call.
 * NULL where there is none. */
float *scratch(size_t num_floats);

#pragma GCC visibility pop
