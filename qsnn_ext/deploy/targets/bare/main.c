/* Runs the bundled samples and prints what the network says of each, and what that took. */
#include "board.h"
#include "model.h"
#include "samples.h"

static model_memory memory;

static void write_number(int64_t number) {
    char text[24], *at = text + sizeof text;
    uint64_t left = number < 0 ? 0u - (uint64_t)number : (uint64_t)number;
    *--at = 0;
    do {
        *--at = (char)('0' + (int)(left % 10));
        left /= 10;
    } while (left);
    if (number < 0) *--at = '-';
    board_write(at);
}

static void write_named(const char *name, int64_t number) {
    board_write(name);
    write_number(number);
}

int main(void) {
    int64_t sums[MODEL_OUTPUT_SIZE];
    int32_t i, k;
    for (i = 0; i < SAMPLES; i++) {
        uint32_t before = board_instructions(), took;
        if (model_sum(&memory, samples[i], SAMPLE_STRIDE, sums) != 0) {
            board_write("runtime and constants are of different versions\n");
            return 1;
        }
        took = board_instructions() - before;
        write_named("sample ", i);
        write_named(": class ", model_largest(sums));
        write_named(", instructions ", took);
        board_write(", answers");
        for (k = 0; k < MODEL_OUTPUT_SIZE; k++) write_named(" ", sums[k]);
        board_write("\n");
    }
    write_named("flash ", board_flash_used());
    write_named(", RAM ", board_ram_used());
    write_named(", stack ", board_stack_used());
    board_write("\n");
    return 0;
}
