/* Reads the input codes of one time step after the other and prints the answers. */
#include <stdio.h>
#include "model.h"
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

static model_memory memory;
static model_code input[MODEL_INPUT_SIZE];
static int32_t output[MODEL_OUTPUT_SIZE];

int main(void) {
    int32_t i;
#ifdef _WIN32
    _setmode(0, _O_BINARY); /* codes are bytes; as text they would end at the first 0x1A */
#endif
    setvbuf(stdin, 0, _IONBF, 0);
    setvbuf(stdout, 0, _IONBF, 0); /* stdio buffers are heap */
    if (model_start(&memory) != 0) return 1;
    while (fread(input, sizeof input, 1, stdin)) {
        model_step(&memory, input, output);
        for (i = 0; i < MODEL_OUTPUT_SIZE; i++) printf("%ld\n", (long)output[i]);
    }
    return 0;
}
