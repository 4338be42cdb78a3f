/* Runs images that come one after the other on standard input, in buffers of exactly the size that
 * their headers state, which hold garbage first. Words in, words out, in the machine's byte order:
 *   image_words, image, steps, input      ->      answers, states */
#include <stdio.h>
#include <stdlib.h>
#include "qsnn.h"
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

static uint32_t *take(size_t words) {
    uint32_t *at = (uint32_t *)malloc(words * 4);
    if (!at) exit(2);
    return at;
}

static int read_words(uint32_t *to, size_t words) { return fread(to, 4, words, stdin) == words; }

static void spoil(uint32_t *at, size_t words) {
    static uint64_t seed = 88172645463325252u;
    size_t i;
    for (i = 0; i < words; i++) {
        seed ^= seed >> 12;
        seed ^= (seed & 0x7ffffffffu) << 25;
        seed ^= seed >> 27;
        at[i] = (uint32_t)(seed >> 16 & 0xffffffffu);
    }
}

int main(void) {
    uint32_t words;
#ifdef _WIN32
    _setmode(0, _O_BINARY), _setmode(1, _O_BINARY);
#endif
    while (read_words(&words, 1)) {
        uint32_t *image = take(words), steps;
        const qsnn_header *h = (const qsnn_header *)(const void *)image;
        uint32_t *state, *arena, *input, *output;
        size_t in, out;
        if (!read_words(image, words) || !read_words(&steps, 1)) return 3;
        in = (size_t)steps * (size_t)h->input_words;
        out = (size_t)steps * (size_t)h->output_words;
        state = take((size_t)h->state_words);
        arena = take((size_t)h->arena_words);
        input = take(in), output = take(out);
        if (!read_words(input, in)) return 3;
        spoil(state, (size_t)h->state_words);
        spoil(arena, (size_t)h->arena_words);
        qsnn_reset(image, state);
        qsnn_run(image, state, arena, (const int32_t *)input, (int32_t)steps, h->input_words,
                 (int32_t *)output);
        fwrite(output, 4, out, stdout);
        fwrite(state, 4, (size_t)h->state_words, stdout);
        free(image), free(state), free(arena), free(input), free(output);
    }
    return 0;
}
