/* The program in memory: fields of values, operations and neurons, as image.py writes them. */
#ifndef QSNN_IMAGE_H
#define QSNN_IMAGE_H
#include "qsnn.h"
#include "qsnn_vector.h"

/* Value table: planes == 0 is int32 [pixel][stride], otherwise bits [pixel][planes][words]. */
enum { V_CHANNELS, V_HEIGHT, V_WIDTH, V_PLANES, V_STRIDE, V_OFFSET, V_SIZE };

enum { OP_CONV, OP_AFFINE, OP_ADD, OP_LOGIC, OP_POOL, OP_NEURON };
enum {
    F_TYPE, F_SOURCE, F_TARGET, F_WEIGHT, F_BINARY, F_ROW_WORDS, F_GROUPS, F_KH, F_KW, F_SH, F_SW,
    F_TOP, F_LEFT, F_DH, F_DW, F_MULTIPLIER, F_SHIFT, F_BIAS, F_PRODUCT32, F_ADD, F_SELF_FACTOR,
    F_ADD_FACTOR, F_NEURON, F_FUNCTION, F_LIST, F_LIST_COUNT, F_JOINED, F_PITCH, F_DEPTH, F_CENTRE,
    F_FIRING, F_PAIRS, F_DENSE, F_DENSE_ROWS, F_METHOD, F_SIZE
};
enum { METHOD_MEASURE, METHOD_EVENTS, METHOD_DENSE };
enum { POOL_MAX, POOL_SUM, POOL_REPEAT };
enum { LOGIC_AND, LOGIC_IAND };

enum {
    N_BITS, N_STATE_BITS, N_LEVELS, N_RESET, N_ORDER, N_DELAY, N_CEILING, N_INITIAL, N_LEAK,
    N_PER_CHANNEL, N_THRESHOLD, N_RESET_VALUE, N_BOUNDS, N_STATE, N_SPIKES, N_MEMBRANE, N_READING,
    N_SOURCE, N_GUESS_SHIFT, N_GUESS_MULTIPLIER, N_SIZE
};
enum { RESET_NONE, RESET_HARD, RESET_SOFT };
enum { ORDER_FIRE_FIRST, ORDER_QUANTIZE_FIRST };
enum { DELAY_NONE, DELAY_TABLE, DELAY_GATE };
#define WIDE_LIMIT 1073741823

typedef struct {
    const uint32_t *image;
    const int32_t *ints; /* the image, read as signed words */
    uint32_t *state;
    uint32_t *arena;
    int32_t *line;       /* scratch: one pixel */
    int32_t *other;      /* scratch: another pixel */
    uint32_t *scratch;   /* what remains */
} context;

static inline const int32_t *value_of(const context *x, int32_t i) {
    return x->ints + x->ints[QSNN_H_VALUES] + i * V_SIZE;
}
static inline int32_t words_of(const int32_t *v) { return (v[V_CHANNELS] + 31) / 32; }
static inline uint32_t last_mask(int32_t channels) {
    return channels % 32 ? (1u << (channels % 32)) - 1u : 0xffffffffu;
}
static inline uint32_t *pixel_bits(const context *x, const int32_t *v, int32_t pixel) {
    return x->arena + v[V_OFFSET] + pixel * v[V_STRIDE];
}
static inline int32_t *pixel_ints(const context *x, const int32_t *v, int32_t pixel) {
    return (int32_t *)(x->arena + v[V_OFFSET]) + pixel * v[V_STRIDE];
}

#endif
