/* How media cut memory and files. The caller reads the numbers here (native.numbers_in). */
#pragma once

/* A direct write or read wants both to begin and end at the first; some media at the second. */
#define SECTOR_BYTES 512
#define PAGE_BYTES 4096
