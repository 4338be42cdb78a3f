/* All of the C library that the runtime uses; WebAssembly copies and fills memory by itself. */
#include <stddef.h>
#define memcpy __builtin_memcpy
#define memset __builtin_memset
