/* Memory whose pages are found before somebody waits for them. */
#pragma once
#include <stddef.h>

/* Have `least` bytes free at the end of the heap, or make it `most`, and find their pages on another
 * thread. Takes half a millisecond. To be called by the thread that takes the memory. */
void grow_heap_ahead(size_t least, size_t most);
