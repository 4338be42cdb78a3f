/* What is compiled to WebAssembly: the runtime of qsnn_ext, and the layout of the images it takes. */
#include "../qsnn_ext/deploy/runtime/qsnn.c"

int32_t qsnn_layout(void);
int32_t qsnn_layout(void) { return QSNN_LAYOUT; }
