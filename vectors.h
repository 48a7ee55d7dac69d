/* Vectors for fused_cpu.c and learn_cpu.c: GCC's and Clang's, a `vec` is LANES float32, `a * b` multiplies them all. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__) && defined(__F16C__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v); /* one instruction: the address need not be a multiple of anything */
    return v;
}

static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

static inline vec all(float x) { return x - (vec){0}; }

/* The numbers of a where the condition is true, of b elsewhere. */
static inline vec where(ints condition, vec a, vec b) { return (vec)((condition & (ints)a) | (~condition & (ints)b)); }

static inline float sum(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#endif
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

/* bfloat16 is the upper half of a float32. */
static inline vec from_bfloat16(const uint16_t *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, ints) << 16);
}

/* e^x, to 1e-7 of itself: 2^n times a polynomial (Moshier's, of Cephes) for what is left, at most half of ln 2.
   NaN stays NaN. */
static inline vec exponential(vec of) {
    vec x = where(of < -87.0f, all(-87.0f), of);
    x = where(x > 88.0f, all(88.0f), x);
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vec n = x * 1.44269504f + magic;
    ints shift = ((ints)n - (ints)magic) << 23;
    n -= magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691e-4f + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return where(of == of, (vec)((ints)p + shift), of);
}

/* The sigmoid by which GELU multiplies x: 0.5 x (1 + tanh(z)) = x / (1 + e^(-2z)), z = sqrt(2 / pi) (x + 0.044715 x^3). */
static inline vec gelu_gate(vec x) { return 1.0f / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x))); }
