/* A few tokens through a GPT on a CPU, in one call: fused_cpu.py says what to compute, and checks that it is right.

PyTorch has 300 operations for such a pass, each of which it looks up, allocates for, and hands to its threads anew; that
takes longer than the arithmetic. Here it is one call and some 30 operations, done by threads that wait for each other at
barriers, each making its share of an operation's outputs:

    embed      tokens -> x (R, C)
    linear     [norm] x W^T [+ bias] [bent] [added to what is there] -> (R, N)
    attend     queries, keys and values (R, 3C), the cache -> y (R, C)

R = B * T rows: T tokens of each of B texts, row b * T + t. All numbers are float32, but the weights, which may have 16
or 8 bits and become float32 on their way to the registers. An output is the same whatever other rows there are: its
products are added up in one order.

Without OpenMP there is one thread. */

#include "vectors.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#if defined(__AVX512F__)
enum { ROWS = 6 }; /* at most so many at once, whose sums fit into the registers */
#else
enum { ROWS = 2 };
#endif
enum { GROUP = 2 * LANES }; /* outputs whose weights lie side by side */
enum { FLOAT32, BFLOAT16, FLOAT16, INT8 };
enum { PLAIN, GELU, RELU_SQUARED, SOFT_CAP };

#if !defined(__F16C__)
typedef _Float16 float16s __attribute__((vector_size(2 * LANES)));
#endif
typedef int8_t bytes __attribute__((vector_size(LANES)));

/* What fused_cpu.py fills in; its classes have the same fields in the same order. */

typedef struct {
    int32_t N, K, format, bend;
    int32_t add;                         /* to what y was? */
    int32_t newest;                      /* only the newest pass->last rows of each text, to pass->logits? */
    int32_t norm;                        /* is x normed? */
    int32_t layer;                       /* of which pass->before and pass->newest are, where there is a shift */
    const void *W;                       /* (N / GROUP, K, GROUP), N rounded up; K is even */
    const float *scale, *bias;           /* (N,) rounded up, or NULL */
    const float *x;                      /* (R, K) */
    float *y;                            /* (R, N) */
    const float *norm_scale, *norm_bias; /* what a norm is multiplied with and moved by: (K,) or NULL */
    const float *shift;                  /* how much of the token before is then added: (K,) or NULL */
} Linear;

typedef struct {
    int32_t H, D, S;        /* heads, their channels (a multiple of LANES), positions in the cache */
    float *k, *v;           /* (B, H, S, D) */
    const float *qkv;       /* (R, 3, H, D) */
    float *y;               /* (R, H, D) */
    const float *cos, *sin; /* (S, D): queries and keys are normed and turned; or NULL */
} Attention;

typedef struct {
    int32_t C, V, n, rows;          /* n: tokens of the longest run that has a vector, 1 for none; rows of their table */
    const float *wte, *wpe;         /* (V, C), and (S, C) or NULL: then x is normed */
    const float *table;             /* (rows, C), where n is above 1 */
    const int64_t *factors;         /* (n,) */
    float *x;                       /* (R, C) */
} Embedding;

typedef struct {
    int32_t B, T, last, start, threads, layers;
    const int64_t *tokens;      /* (B, n - 1 + T) */
    const float *const *before; /* for each layer what the token before was, normed: (B, C), or NULL */
    float *newest;              /* (layers, B, T, C): the same for these tokens */
    float *logits;              /* (B, last, V) */
    float *scratch;             /* (threads, scratch_size) */
    int64_t stride;             /* numbers from one text to the next in `before` */
    int64_t scratch_size;
} Pass;

/* ---------------------------------------------------------------------------------------------------------------------
   Vectors */

/* LANES weights from the i-th on, as float32. */
static inline __attribute__((always_inline)) vec weights(const void *W, size_t i, const int format) {
    if (format == FLOAT32) return load((const float *)W + i);
    if (format == BFLOAT16) return from_bfloat16((const uint16_t *)W + i);
    if (format == FLOAT16) {
        const void *h = (const uint16_t *)W + i;
#if defined(__AVX512F__)
        return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(h));
#elif defined(__F16C__)
        return (vec)_mm256_cvtph_ps(_mm_loadu_si128(h));
#else
        float16s v;
        memcpy(&v, h, sizeof v);
        return __builtin_convertvector(v, vec);
#endif
    }
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)((const int8_t *)W + i))));
#endif
    bytes b;
    memcpy(&b, (const int8_t *)W + i, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, ints), vec);
}

static inline vec bent(vec x, int bend) {
    switch (bend) {
    case GELU:
        return x * gelu_gate(x);
    case RELU_SQUARED:
        return where(x < 0.0f, all(0), x * x);
    case SOFT_CAP: /* 15 tanh(x / 15) */
        return 15.0f - 30.0f / (1.0f + exponential(x * (2 / 15.0f)));
    }
    return x;
}

/* Shift and scale n numbers to mean 0 and variance 1: LayerNorm without what it learns. x and y may be the same. */
static void norm(const float *x, float *y, int n) {
    float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= n;
#pragma omp simd reduction(+ : variance)
    for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(variance / n + 1e-5f);
#pragma omp simd
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale;
}

/* ---------------------------------------------------------------------------------------------------------------------
   The three operations. Each thread makes parts `first` to `end` - 1 of `n`. */

static void share(int n, int *first, int *end) {
    int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = (int64_t)n * thread / threads;
    *end = (int64_t)n * (thread + 1) / threads;
}

/* Where row `row`'s token is; those before it in its text are before it. */
static const int64_t *token(const Embedding *e, const Pass *pass, int row) {
    return pass->tokens + row / pass->T * (e->n - 1 + pass->T) + e->n - 1 + row % pass->T;
}

static void embed(const Embedding *e, const Pass *pass) {
    int first, end, C = e->C;
    share(pass->B * pass->T, &first, &end);
    for (int row = first; row < end; row++) {
        const int64_t *newest = token(e, pass, row);
        float *x = e->x + (size_t)row * C;
        memcpy(x, e->wte + *newest * C, C * sizeof *x);
        if (e->wpe)
            for (int i = 0; i < C; i++) x[i] += e->wpe[(size_t)(pass->start + row % pass->T) * C + i];
        int64_t number = e->n > 1 ? (*newest + 2) * e->factors[0] : 0; /* of a run of tokens: modern.NGrams.rows */
        for (int back = 1; back < e->n; back++) {
            number += (newest[-back] + 2) * e->factors[back];
            const float *run = e->table + number % 2147483647 % e->rows * C;
            for (int i = 0; i < C; i++) x[i] += run[i];
        }
        if (!e->wpe) norm(x, x, C);
    }
}

/* What a Linear multiplies with its weights: row `row` of x as it is, or normed in the thread's own memory. */
static const float *prepared(const Linear *l, const Pass *pass, int rows, float *scratch) {
    int K = l->K, T = pass->T;
    if (!l->norm) return l->x;
    for (int row = 0; row < rows; row++) {
        int from = l->newest ? row / pass->last * T + T - pass->last + row % pass->last : row;
        float *u = scratch + (size_t)row * K;
        norm(l->x + (size_t)from * K, u, K);
        if (l->norm_scale)
            for (int i = 0; i < K; i++) u[i] *= l->norm_scale[i];
        if (l->norm_bias)
            for (int i = 0; i < K; i++) u[i] += l->norm_bias[i];
    }
    if (l->shift) {
        float *newest = pass->newest + (size_t)l->layer * rows * K;
        if (omp_get_thread_num() == 0) /* all threads have made the same rows */
            memcpy(newest, scratch, (size_t)rows * K * sizeof *scratch);
        for (int row = rows - 1; row >= 0; row--) { /* backwards: each needs the one before as it was */
            float *u = scratch + (size_t)row * K;
            const float *before = row % T ? u - K : pass->before[l->layer] + row / T * pass->stride;
            for (int i = 0; i < K; i++) u[i] += before[i] * l->shift[i];
        }
    }
    return scratch;
}

/* GROUP outputs of `rows` rows, of which there are at most ROWS: W (K, GROUP), x (rows, K) -> y (rows, GROUP).
   Odd and even numbers are added up separately: a sum must wait for the one before. */
static inline __attribute__((always_inline)) void multiply(
    const void *W, const float *x, float *y, int K, const int rows, const int format) {
    vec even[ROWS][2] = {{{0}}}, odd[ROWS][2] = {{{0}}};
    for (int k = 0; k < K; k += 2) {
        vec a = weights(W, (size_t)k * GROUP, format), b = weights(W, (size_t)k * GROUP + LANES, format);
        vec c = weights(W, (size_t)(k + 1) * GROUP, format), d = weights(W, (size_t)(k + 1) * GROUP + LANES, format);
        for (int r = 0; r < rows; r++) {
            float u = x[(size_t)r * K + k], w = x[(size_t)r * K + k + 1];
            even[r][0] += a * u, even[r][1] += b * u;
            odd[r][0] += c * w, odd[r][1] += d * w;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++) store(y + r * GROUP + i * LANES, even[r][i] + odd[r][i]);
}

/* The same for any number of rows, several at a time, so that weights that were read are used for all of them. */
static inline __attribute__((always_inline)) void multiply_all(
    const void *W, const float *x, float *y, int K, int rows, const int format) {
    int r = 0;
#if defined(__AVX512F__)
    for (; r + 6 <= rows; r += 6) multiply(W, x + (size_t)r * K, y + r * GROUP, K, 6, format);
    for (; r + 4 <= rows; r += 4) multiply(W, x + (size_t)r * K, y + r * GROUP, K, 4, format);
#endif
    for (; r + 2 <= rows; r += 2) multiply(W, x + (size_t)r * K, y + r * GROUP, K, 2, format);
    if (r < rows) multiply(W, x + (size_t)r * K, y + r * GROUP, K, 1, format);
}

/* A part is a group of outputs, of all rows. */
static void linear(const Linear *l, const Pass *pass) {
    int K = l->K, rows = pass->B * (l->newest ? pass->last : pass->T), first, end;
    float *out = pass->scratch + omp_get_thread_num() * pass->scratch_size; /* of a group: (rows, GROUP) */
    const float *u = prepared(l, pass, rows, out + (size_t)rows * GROUP);
    float *y = l->newest ? pass->logits : l->y;
    share((l->N + GROUP - 1) / GROUP, &first, &end);
    for (int g = first; g < end; g++) {
        size_t i = (size_t)g * GROUP * K;
        const char *W = l->W;
        switch (l->format) {
        case FLOAT32: multiply_all(W + 4 * i, u, out, K, rows, FLOAT32); break;
        case BFLOAT16: multiply_all(W + 2 * i, u, out, K, rows, BFLOAT16); break;
        case FLOAT16: multiply_all(W + 2 * i, u, out, K, rows, FLOAT16); break;
        case INT8: multiply_all(W + i, u, out, K, rows, INT8);
        }
        int n = g * GROUP, many = l->N - n < GROUP ? l->N - n : GROUP;
        for (int r = 0; r < rows; r++) {
            float *done = out + r * GROUP, *place = y + (size_t)r * l->N + n;
            for (int j = 0; j < GROUP; j += LANES) {
                vec v = load(done + j);
                if (l->scale) v *= load(l->scale + n + j);
                if (l->bias) v += load(l->bias + n + j);
                store(done + j, bent(v, l->bend));
            }
            for (int j = 0; j < many; j++) place[j] = l->add ? place[j] + done[j] : done[j];
        }
    }
}

/* modern.rotate: turn a head's channels by their position's angles. */
static void turn(float *x, const float *cos, const float *sin, int D) {
    for (int i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] + b * sin[i];
        x[i + D / 2] = b * cos[i + D / 2] + a * sin[i + D / 2];
    }
}

/* The mean of the values of S positions, as the weights say: n vecs of their D channels. */
static inline __attribute__((always_inline)) void weighted(
    const float *weights, const float *values, float *y, int S, int D, float total, const int n) {
    vec mean[4] = {{0}};
    for (int s = 0; s < S; s++)
        for (int i = 0; i < n; i++) mean[i] += weights[s] * load(values + (size_t)s * D + i * LANES);
    for (int i = 0; i < n; i++) store(y + i * LANES, mean[i] / total);
}

/* Softmax attention of each text's T tokens to those before them and to themselves, whose keys and values are added to
   the cache first. A part is a head of a text. */
static void attend(const Attention *a, const Pass *pass) {
    int first, end, H = a->H, D = a->D, T = pass->T, start = pass->start;
    float *scores = pass->scratch + omp_get_thread_num() * pass->scratch_size; /* (S,), a multiple of LANES */
    float *q = scores + (a->S + LANES - 1) / LANES * LANES;
    share(pass->B * H, &first, &end);
    for (int task = first; task < end; task++) {
        int b = task / H, head = task % H;
        const float *qkv = a->qkv + ((size_t)b * T * 3 * H + head) * D; /* of the text's first token */
        float *keys = a->k + (size_t)task * a->S * D, *values = a->v + (size_t)task * a->S * D;
        for (int t = 0; t < T; t++) {
            const float *own = qkv + (size_t)t * 3 * H * D;
            float *k = keys + (size_t)(start + t) * D;
            memcpy(q, own, D * sizeof *q);
            memcpy(k, own + H * D, D * sizeof *k);
            memcpy(values + (size_t)(start + t) * D, own + 2 * H * D, D * sizeof *q);
            if (a->cos) {
                const float *cos = a->cos + (size_t)(start + t) * D, *sin = a->sin + (size_t)(start + t) * D;
                norm(q, q, D), turn(q, cos, sin, D);
                norm(k, k, D), turn(k, cos, sin, D);
            }
            int S = start + t + 1; /* so many positions it sees */
            float scale = 1 / sqrtf(D), highest = -INFINITY, total = 0;
            for (int s = 0; s < S; s++) {
                vec products = {0};
                for (int d = 0; d < D; d += LANES) products += load(q + d) * load(keys + (size_t)s * D + d);
                scores[s] = sum(products) * scale;
                highest = scores[s] > highest ? scores[s] : highest;
            }
            for (int s = S; s % LANES; s++) scores[s] = -INFINITY;
            for (int s = 0; s < S; s += LANES) store(scores + s, exponential(load(scores + s) - highest));
            for (int s = 0; s < S; s++) total += scores[s];
            float *y = a->y + ((size_t)(b * T + t) * H + head) * D;
            int d = 0;
            for (; d + 4 * LANES <= D; d += 4 * LANES) weighted(scores, values + d, y + d, S, D, total, 4);
            for (; d < D; d += LANES) weighted(scores, values + d, y + d, S, D, total, 1);
        }
    }
}

/* ---------------------------------------------------------------------------------------------------------------------
   All of a pass */

int32_t group(void) { return GROUP; }

/* Returns 1, and does nothing, where a token is not in the vocabulary. */
int32_t run(const Embedding *embedding, const Linear *linears, const Attention *attentions, const Pass *pass) {
    for (int row = 0; row < pass->B * pass->T; row++) {
        int64_t id = *token(embedding, pass, row);
        if (id < 0 || id >= embedding->V) return 1;
    }
#pragma omp parallel num_threads(pass->threads)
    {
        const Linear *l = linears;
        embed(embedding, pass);
#pragma omp barrier
        for (int i = 0; i < pass->layers; i++) { /* c_attn, attention, c_proj, c_fc, c_proj */
            linear(l++, pass);
#pragma omp barrier
            attend(attentions + i, pass);
#pragma omp barrier
            for (int j = 0; j < 3; j++) {
                linear(l++, pass);
#pragma omp barrier
            }
        }
        linear(l, pass); /* lm_head */
    }
    return 0;
}
