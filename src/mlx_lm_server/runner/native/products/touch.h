/* Memory whose pages are found before they are written. */
#pragma once
#include <stddef.h>

#pragma GCC visibility push(hidden)

/* Soon, on another thread; what is there stays. Where the system cannot, nothing happens. */
void touch(void *memory, size_t size);

#pragma GCC visibility pop
