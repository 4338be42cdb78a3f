/* Numbers of one type: included once for each REAL (float or double) that is computed in.
 *
 * Needs REAL, its signed integer INT, and R(x), which makes a name of this type's. Loops are
 * plain ones that compilers turn into vector instructions: no branches, no calls. Nothing here
 * relies on relaxed floating point; the builds forbid contraction, so that results are those of
 * PyTorch's elementwise operations. */

/* Adding and subtracting this rounds to a whole number, half to even: 1.5 times the smallest power
 * of two whose neighbours are 1 apart. */
#define SHIFTER ((REAL)(sizeof(REAL) == 4 ? 12582912.0 : 6755399441055744.0))
#define MANTISSA (sizeof(REAL) == 4 ? 23 : 52)
#define ONE_BITS ((INT)(sizeof(REAL) == 4 ? 0x3f800000 : 0x3ff0000000000000))

static inline REAL R(of_bits)(INT bits) {
    REAL value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline INT R(bits_of)(REAL value) {
    INT bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline REAL R(magnitude)(REAL x) {
    return R(of_bits)(R(bits_of)(x) & (INT)~((UINT)1 << (8 * sizeof(REAL) - 1)));
}

/* The next number. */
static inline REAL R(above)(REAL x) {
    return (REAL)(sizeof(REAL) == 4 ? nextafterf((float)x, INFINITY) : nextafter(x, INFINITY));
}

static inline REAL R(whole)(REAL x) { return (x + SHIFTER) - SHIFTER; }

/* exp(x) - 1 as 2^n * (1 + p) - 1, for |x| below the logarithm of the largest number. Taylor's
 * series of p over |r| <= ln(2)/2 ends where it is below half a unit in the last place. */
static inline REAL R(power)(REAL x, REAL *p) {
    const REAL shifted = x * (REAL)1.4426950408889634 + SHIFTER, n = shifted - SHIFTER;
    /* ln 2 in two parts, the first short enough for n times it to be exact. */
    const REAL high = (REAL)(sizeof(REAL) == 4 ? 0.693359375 : 0x1.62e42feep-1);
    const REAL low = (REAL)(sizeof(REAL) == 4 ? -2.12194440e-4 : 0x1.a39ef35793c76p-33);
    const REAL r = x - n * high - n * low;
    REAL s;
    if (sizeof(REAL) == 4) {
        s = (REAL)(1.0 / 5040);
    } else {
        s = (REAL)(1.0 / 6227020800);
        s = s * r + (REAL)(1.0 / 479001600);
        s = s * r + (REAL)(1.0 / 39916800);
        s = s * r + (REAL)(1.0 / 3628800);
        s = s * r + (REAL)(1.0 / 362880);
        s = s * r + (REAL)(1.0 / 40320);
        s = s * r + (REAL)(1.0 / 5040);
    }
    s = s * r + (REAL)(1.0 / 720);
    s = s * r + (REAL)(1.0 / 120);
    s = s * r + (REAL)(1.0 / 24);
    s = s * r + (REAL)(1.0 / 6);
    s = s * r + (REAL)0.5;
    *p = r + r * r * s;
    return R(of_bits)((INT)(((UINT)R(bits_of)(shifted) << MANTISSA) + (UINT)ONE_BITS));
}

/* exp(-x) for x >= 0; 0 where it would be denormal. */
static inline REAL R(exp_minus)(REAL x) {
    const REAL most = (REAL)(sizeof(REAL) == 4 ? 87 : 708);
    REAL p, scale = R(power)(x > most ? -most : -x, &p);
    const REAL value = scale + scale * p;
    return x > most ? 0 : value;
}

static inline REAL R(tanh)(REAL x) {
    const REAL size = 2 * R(magnitude)(x), most = 40; /* beyond it tanh rounds to 1 */
    REAL p, scale = R(power)(size > most ? most : size, &p);
    const REAL above = scale * p + (scale - 1); /* exp(2|x|) - 1 */
    const REAL value = above / (above + 2);
    return x < 0 ? -value : value;
}

/* Largest of `x`, or of its magnitudes, and of `so_far`; NaN and infinity are left out. */
static REAL R(largest)(const REAL *x, int64_t n, int64_t absolute, REAL so_far) {
    enum { LANES = 64 / sizeof(REAL) };
    const INT mask = absolute ? (INT)~((UINT)1 << (8 * sizeof(REAL) - 1)) : (INT)-1;
    const REAL infinity = (REAL)INFINITY;
    REAL most[LANES];
    int64_t i;
    int k;
    for (k = 0; k < LANES; k++) most[k] = so_far;
    for (i = 0; i + LANES <= n; i += LANES)
        for (k = 0; k < LANES; k++) {
            const REAL v = R(of_bits)(R(bits_of)(x[i + k]) & mask);
            const REAL finite = v < infinity ? v : -infinity;
            most[k] = finite > most[k] ? finite : most[k];
        }
    for (; i < n; i++) {
        const REAL v = R(of_bits)(R(bits_of)(x[i]) & mask);
        if (v > so_far && v < infinity) so_far = v;
    }
    for (k = 0; k < LANES; k++) so_far = most[k] > so_far ? most[k] : so_far;
    return so_far;
}
