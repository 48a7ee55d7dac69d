/* The loss of a GPT and its gradients on a CPU: learn_cpu.py says of which model, and checks that it is right.

PyTorch takes some 120 operations for a layer, forward and backward, and each writes to memory what the next reads
again. Here the whole model is one call, learn(), of one thread; other threads have other windows. Between two products
of matrices all is done with a STRIP of positions at a time, which stay in the cache.

R = B * T rows: T positions of each of B windows. Numbers that are multiplied, and those kept for the way back, are
`num`: float32, or bfloat16 where compiled with -DBFLOAT16. All else is float32. -DLONGEST=16: tokens of the longest run
that has a vector.

    tokens -> their vectors -> x
    each layer: x -> norm -> c_attn -> attention -> c_proj, added to x -> norm -> c_fc -> bent -> c_proj, added
    x -> norm -> logits -> loss -> all gradients, the same way back

A product x W^T sums over 4-byte `unit`s, a float32 or two bfloat16, which one instruction (vdpbf16ps) multiplies and
adds. Its left side are rows as they are; its right side is laid out in panels of LANES columns, (N / LANES, K, LANES)
units, so that one load brings a unit of each column. */

#include "vectors.h"

enum { STRIP = 32 }; /* rows; a multiple of ROWS, LANES and 2 */
#if defined(__AVX512F__)
enum { ROWS = 8 }; /* of a tile, 2 * LANES wide, whose sums fit into the registers */
#else
enum { ROWS = 4 };
#endif

typedef int32_t unit;
#ifdef BFLOAT16
enum { PAIR = 2 }; /* numbers in a unit */
typedef uint16_t num;
static inline vec from(const num *p) { return from_bfloat16(p); }
static inline void to(num *p, vec v) {
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, sizeof h);
}
static inline vec multiplied(vec sum, unit a, ints b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}
#else
enum { PAIR = 1 };
typedef float num;
static inline vec from(const num *p) { return load(p); }
static inline void to(num *p, vec v) { store(p, v); }
static inline vec multiplied(vec sum, unit a, ints b) {
    float f;
    memcpy(&f, &a, sizeof f);
    return sum + f * (vec)b;
}
#endif

/* What learn_cpu.py fills in; its classes have the same fields in the same order. */

typedef struct { /* nn.Linear */
    int32_t N, K;
    const unit *forward;  /* its weight (N, K) in panels, to multiply with its transpose: lanes are its rows */
    const unit *backward; /* to multiply with it: lanes are its columns */
    const float *bias;    /* (N,) or NULL */
    float *d_weight, *d_bias;
} Linear;

typedef struct { /* LayerNorm; all NULL where nothing is learned */
    const float *weight, *bias;
    float *d_weight, *d_bias;
} Norm;

typedef struct {
    Linear attn, attn_proj, fc, fc_proj;
    Norm norm_1, norm_2;
    const float *shift;       /* (C,): how much of the position before flows in; or NULL */
    float *d_shift;
} Layer;

typedef struct {
    int32_t modern;           /* modern.Modern, not model.GPT */
    int32_t C, H, V, layers;
    int32_t foretold;         /* how many of the tokens behind it each position foretells */
    int32_t ngram, ngram_rows;
    const Layer *layer;
    const float *wte, *wpe, *ngrams; /* (V, C), (T, C) or NULL, (ngram_rows, C) or NULL */
    float *d_wte, *d_wpe, *d_ngrams;
    const int64_t *factors;   /* (ngram,) */
    const float *cos, *sin;   /* (T, D): queries and keys are normed and turned; or NULL */
    Norm norm;
    Linear head;              /* (foretold * wide(V), C), V rows and zeros for each; its gradient (foretold * V, C) */
} Model;

typedef struct {
    int32_t B, T;
    int32_t threshold;        /* of 256: how many numbers dropout sets to zero */
    int32_t add;              /* are gradients of matrices added to what is there? all others always are */
    uint64_t seed;
    float share, ahead_share; /* by how much the loss is multiplied, and by how much more that of further tokens */
    const int64_t *idx, *targets; /* (B, T); of a target of -1 there is no loss */
    char *kept, *scratch;     /* as large as sizes() says */
} Pass;

static void *take(char **place, size_t bytes) {
    char *here = *place;
    *place += (bytes + 63) / 64 * 64;
    return here;
}

static int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

/* How many rows the strip has that begins at `first`, of `all` rows. */
static int rows_of_strip(int first, int all) { return all - first < STRIP ? all - first : STRIP; }

/* So many logits, or weights of attention, a row has with what fills it up to whole vectors of any kind. */
int wide(int n) { return round_up(n, 16); }

/* What the backward pass needs of a layer's forward pass. */
typedef struct {
    num *x;        /* (R, C): what it reads */
    num *qkv;      /* (R, 3, H, D), normed and turned where they are */
    num *y;        /* (R, C): what attention gathered */
    num *middle;   /* (R, C): x behind attention */
    unit *bent;    /* in panels: (R, 4C) */
    num *slope;    /* (R, 4C): its derivative */
    float *total;  /* (B, H, T): log of the sum of e^score */
    float *scales; /* (R, 2, H): by how much norming multiplied queries and keys */
    char *end;
} Kept;

static Kept keep(const Model *model, const Pass *pass, char *place) {
    /* Tiles read some rows too many, the last ones from the next array. */
    size_t R = round_up(pass->B * pass->T, STRIP), C = model->C;
    Kept k;
    k.x = take(&place, R * C * sizeof(num));
    k.qkv = take(&place, 3 * R * C * sizeof(num));
    k.y = take(&place, R * C * sizeof(num));
    k.middle = take(&place, R * C * sizeof(num));
    k.bent = take(&place, 4 * R * C * sizeof(num));
    k.slope = take(&place, 4 * R * C * sizeof(num));
    k.total = take(&place, R * model->H * sizeof(float));
    k.scales = take(&place, 2 * R * model->H * sizeof(float));
    k.end = place;
    return k;
}

/* Memory for one head of attention, where a strip of queries sees up to T keys. */
typedef struct {
    unit *rows_k, *rows_v, *columns_k, *columns_v, *columns_q, *columns_d; /* in panels: (T, D) each */
    unit *columns_w, *columns_s;             /* (T, T): weights and the scores' gradients */
    float *scores, *d_weights, *out;         /* (STRIP, T), (STRIP, T), (STRIP, D) */
    num *w, *s;                              /* (STRIP, T) */
} Room;

static Room make_room(const Model *model, const Pass *pass, char **place) {
    size_t T = round_up(pass->T, STRIP), D = model->C / model->H;
    Room r;
    unit **panels[] = {&r.rows_k, &r.rows_v, &r.columns_k, &r.columns_v, &r.columns_q, &r.columns_d};
    for (int i = 0; i < 6; i++) *panels[i] = take(place, T * D * sizeof(num));
    r.columns_w = take(place, T * T * sizeof(num));
    r.columns_s = take(place, T * T * sizeof(num));
    r.scores = take(place, STRIP * T * sizeof(float));
    r.d_weights = take(place, STRIP * T * sizeof(float));
    r.out = take(place, STRIP * D * sizeof(float));
    r.w = take(place, STRIP * T * sizeof(num));
    r.s = take(place, STRIP * T * sizeof(num));
    return r;
}

/* Memory that each layer uses anew. N is 4C, or foretold * wide(V) where that is more. */
typedef struct {
    Room room;
    float *row, *h;                           /* (2, C), (C,) */
    float *product;                           /* (STRIP, N) */
    num *strip;                               /* (STRIP, N) */
    num *out, *d_x, *d_middle, *d_y, *d_qkv;  /* (R, C), but d_qkv (R, 3C) */
    unit *in, *d_sum, *d_wide, *d_in;         /* panels: (R, C), (R, C), (R, N), (R, 3C) */
    char *end;
} Scratch;

static Scratch make_scratch(const Model *model, const Pass *pass, char *place) {
    size_t R = round_up(pass->B * pass->T, STRIP), C = model->C, N = model->foretold * wide(model->V);
    if (N < 4 * C) N = 4 * C;
    Scratch s;
    s.room = make_room(model, pass, &place);
    s.row = take(&place, 2 * C * sizeof(float));
    s.h = take(&place, C * sizeof(float));
    s.product = take(&place, STRIP * N * sizeof(float));
    s.strip = take(&place, STRIP * N * sizeof(num));
    s.out = take(&place, R * C * sizeof(num));
    s.d_x = take(&place, R * C * sizeof(num));
    s.d_middle = take(&place, R * C * sizeof(num));
    s.d_y = take(&place, R * C * sizeof(num));
    s.d_qkv = take(&place, 3 * R * C * sizeof(num));
    s.in = take(&place, R * C * sizeof(num));
    s.d_sum = take(&place, R * C * sizeof(num));
    s.d_wide = take(&place, N * R * sizeof(num));
    s.d_in = s.d_wide; /* which is no longer needed then */
    s.end = place;
    return s;
}

typedef struct {
    uint64_t seed;
    uint32_t threshold;       /* as in Pass */
    uint32_t draws[16];       /* see survivors() */
    uint64_t drawn;           /* which ones they are, counted from 1 */
} Dropout;

/* A layer in a pass. */
typedef struct {
    const Layer *weights;
    const float *cos, *sin;
    int R, T, C, H, modern, add;
    Dropout dropout[3];       /* see WEIGHTS */
    num *out;                 /* (R, C): what the next one reads */
    Kept kept;
    Scratch scratch;
} Now;

/* ---------------------------------------------------------------------------------------------------------------------
   Products */

/* ROWS x (panels * LANES) sums over K units: A's r-th row begins at A + r * row and goes on by `step`. */
static inline __attribute__((always_inline)) void tile(
    const unit *A, size_t row, const size_t step, const unit *B, size_t panel, int K, float *Y, size_t ld, int add,
    const int panels) {
    vec sums[ROWS][2] = {{{0}}};
    for (int k = 0; k < K; k++) {
        ints b[2];
        for (int j = 0; j < panels; j++) memcpy(&b[j], B + j * panel + (size_t)k * LANES, sizeof b[j]);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < panels; j++) sums[r][j] = multiplied(sums[r][j], A[r * row + k * step], b[j]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < panels; j++) {
            float *y = Y + r * ld + j * LANES;
            store(y, add ? load(y) + sums[r][j] : sums[r][j]);
        }
}

/* Y (M, N) = A B, or added to it; M is rounded up to ROWS, N is a multiple of LANES, K counts units. B is in panels,
   `panel` units from one to the next. A is row after row, `row` units from one to the next; or, where `columns`, in
   panels itself, whose lanes are the rows. */
static inline __attribute__((always_inline)) void multiply(
    const unit *A, size_t row, int M, const unit *B, size_t panel, int N, int K, float *Y, size_t ld, int add,
    const int columns) {
    for (int n = 0; n < N; n += 2 * LANES)
        for (int m = 0; m < M; m += ROWS) {
            const unit *a = columns ? A + m / LANES * row + m % LANES : A + m * row, *b = B + n / LANES * panel;
            size_t next = columns ? 1 : row, step = columns ? LANES : 1;
            float *y = Y + m * ld + n;
            if (n + LANES < N) tile(a, next, step, b, panel, K, y, ld, add, 2);
            else tile(a, next, step, b, panel, K, y, ld, add, 1);
        }
}

static void rows_times(const num *A, size_t row, int M, const unit *B, size_t panel, int N, int K, float *Y, size_t ld) {
    multiply((const unit *)A, row / PAIR, M, B, panel, N, K / PAIR, Y, ld, 0, 0);
}

static void columns_times(
    const unit *A, size_t row, int M, const unit *B, size_t panel, int N, int K, float *Y, size_t ld, int add) {
    multiply(A, row, M, B, panel, N, K, Y, ld, add, 1);
}

/* Lay x (R, K) out in panels whose lanes are its rows, for products that sum over its columns. Rows from R up to `filled`
   are 0. */
static void lanes_are_rows(const num *x, size_t ld, int R, int filled, int K, unit *panels, size_t panel) {
    for (int first = 0; first < filled; first += LANES, panels += panel)
        for (int k = 0; k < K / PAIR; k++) {
            unit u[LANES] = {0};
            int lanes = R - first < LANES ? R - first : LANES;
            if (lanes == LANES) /* almost always; the compiler then knows how many they are */
                for (int lane = 0; lane < LANES; lane++) memcpy(u + lane, x + (first + lane) * ld + k * PAIR, sizeof *u);
            else
                for (int lane = 0; lane < lanes; lane++) memcpy(u + lane, x + (first + lane) * ld + k * PAIR, sizeof *u);
            memcpy(panels + k * LANES, u, sizeof u);
        }
}

/* Lay x (R, N) out in panels whose lanes are its columns, for products that sum over its rows. */
static void lanes_are_columns(const num *x, size_t ld, int R, int filled, int N, unit *panels, size_t panel) {
    for (int n = 0; n < N; n += LANES)
        for (int r = 0; r < filled; r += PAIR) {
            ints u = {0};
#ifdef BFLOAT16
            halves a = {0}, b = {0};
            if (r < R) memcpy(&a, x + r * ld + n, sizeof a);
            if (r + 1 < R) memcpy(&b, x + (r + 1) * ld + n, sizeof b);
            u = __builtin_convertvector(a, ints) | __builtin_convertvector(b, ints) << 16;
#else
            if (r < R) memcpy(&u, x + r * ld + n, sizeof u);
#endif
            memcpy(panels + n / LANES * panel + (size_t)(r / PAIR) * LANES, &u, sizeof u);
        }
}

/* Lay out R rows, and zeros behind them up to `filled`, as rows `first` and following of a weight (N, K), for
   Linear.forward and .backward. */
void lay_out(const float *weight, int R, int filled, int first, int N, int K, unit *forward, unit *backward) {
    num some[LANES * LANES];
    for (int r = 0; r < filled; r += LANES)
        for (int k = 0; k < K; k += LANES) {
            for (int i = 0; i < LANES; i++)
                to(some + i * LANES, r + i < R ? load(weight + (size_t)(r + i) * K + k) : all(0));
            size_t row = first + r, by_row = (size_t)K / PAIR * LANES, by_column = (size_t)N / PAIR * LANES;
            unit *rows = forward + row / LANES * by_row + k / PAIR * LANES;
            lanes_are_rows(some, LANES, LANES, LANES, LANES, rows, by_row);
            unit *columns = backward + k / LANES * by_column + row / PAIR * LANES;
            lanes_are_columns(some, LANES, LANES, LANES, LANES, columns, by_column);
        }
}

/* Y (M, N) = x W^T of rows x (M, K). */
static void linear(const Linear *l, const num *x, int M, float *Y) {
    rows_times(x, l->K, M, l->forward, (size_t)l->K / PAIR * LANES, l->N, l->K, Y, l->N);
}

/* d_x (M, K) = d_y W of rows d_y (M, N). */
static void linear_backward(const Linear *l, const num *d_y, int M, float *d_x) {
    rows_times(d_y, l->N, M, l->backward, (size_t)l->N / PAIR * LANES, l->K, l->N, d_x, l->K);
}

/* d_weight = d_y^T x, or added to it, both in panels whose lanes are columns, of `filled` rows. */
static void weight_gradient(const Linear *l, const unit *d_y, const unit *x, int filled, int add) {
    int K = filled / PAIR;
    size_t panel = (size_t)K * LANES;
    int rows = l->N > l->K ? STRIP : l->N; /* of the larger one at a time: the smaller one then stays in the cache */
    for (int n = 0; n < l->N; n += rows) {
        const unit *some = d_y + n / LANES * panel;
        int m = l->N - n < rows ? l->N - n : rows;
        columns_times(some, panel, m, x, panel, l->K, K, l->d_weight + (size_t)n * l->K, l->K, add);
    }
}

/* ---------------------------------------------------------------------------------------------------------------------
   What is done with each position */

static inline ints lane_numbers(void) {
    ints i;
    for (int j = 0; j < LANES; j++) i[j] = j;
    return i;
}

enum { WEIGHTS, FIRST_SUM, SECOND_SUM }; /* where a layer has dropout: in attention, and before it adds to x */

/* Mix the bits of each number (Wellons 2018, "Prospecting for hash functions", lowbias32). */
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
static inline bits mixed(bits x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* With what dropout multiplies LANES numbers from the i-th on: 0, or what keeps their mean. Each is decided by 8 bits, as
   in model.dropout, which are made of i and the seed alone, so that the way back decides as the way there did. A draw
   of 32 bits decides four numbers that are 16 apart. */
static inline vec survivors(Dropout *d, uint64_t i) {
    if (d->drawn != i / 64 + 1) {
        d->drawn = i / 64 + 1;
        for (int j = 0; j < 16; j += LANES) {
            bits x = mixed((bits)lane_numbers() + (uint32_t)(i / 64 * 16 + j + d->seed));
            x = mixed(x + (uint32_t)(d->seed >> 32) + (uint32_t)(i >> 34));
            memcpy(d->draws + j, &x, sizeof x);
        }
    }
    bits x;
    memcpy(&x, d->draws + i % 16, sizeof x);
    ints kept = (ints)((x >> i / 16 % 4 * 8 & 255) >= d->threshold);
    return where(kept, all(256.0f / (256 - d->threshold)), all(0));
}

static inline vec dropped(Dropout *d, uint64_t i, vec v) { return d->threshold ? v * survivors(d, i) : v; }

/* The n-th dropout of a pass: 0 is that of the vectors of tokens, then come each layer's. Its seed is the n-th number of
   splitmix64 (Steele et al. 2014). */
static Dropout dropout(const Pass *pass, int n) {
    uint64_t x = pass->seed + (n + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (Dropout){.seed = x ^ x >> 31, .threshold = pass->threshold};
}

/* What the n-th dropout multiplies the first `count` numbers with, for learn_cpu.py's trial. */
void masks(const Pass *pass, int n, int64_t count, float *out) {
    Dropout d = dropout(pass, n);
    for (int64_t i = 0; i < count; i += LANES) store(out + i, survivors(&d, i));
}

static inline vec mean_of(const float *x, int n) {
    vec total = {0};
    for (int i = 0; i < n; i += LANES) total += load(x + i);
    return all(sum(total) / n);
}

/* Shift and scale n numbers to mean 0 and variance 1; returns the scale. */
static float normed(float *x, int n) {
    vec mean = mean_of(x, n), squares = {0};
    for (int i = 0; i < n; i += LANES) {
        vec v = load(x + i) - mean;
        squares += v * v;
        store(x + i, v);
    }
    float scale = 1 / sqrtf(sum(squares) / n + 1e-5f);
    for (int i = 0; i < n; i += LANES) store(x + i, load(x + i) * scale);
    return scale;
}

/* The gradient of what was normed, from that of the result d: scale (d - mean(d) - x mean(d x)), x the result. */
static void normed_backward(const float *x, float *d, int n, float scale) {
    vec along = {0}, mean = mean_of(d, n);
    for (int i = 0; i < n; i += LANES) along += load(x + i) * load(d + i);
    along = all(sum(along) / n);
    for (int i = 0; i < n; i += LANES) store(d + i, scale * (load(d + i) - mean - load(x + i) * along));
}

/* modern.rotate: turn a head's channels by their position's angles; or back, with direction -1. */
static void turn(float *x, const float *cos, const float *sin, int D, float direction) {
    for (int i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] + direction * b * sin[i];
        x[i + D / 2] = b * cos[i] - direction * a * sin[i];
    }
}

static void copy_row(const num *x, float *y, int n) {
    for (int i = 0; i < n; i += LANES) store(y + i, from(x + i));
}

static void round_row(const float *x, num *y, int n) {
    for (int i = 0; i < n; i += LANES) to(y + i, load(x + i));
}

/* x = norm(row), and behind it what the norm has learned -> h. Returns the scale. */
static float norm_row(const Norm *norm, const num *row, float *x, float *h, int C) {
    copy_row(row, x, C);
    float scale = normed(x, C);
    for (int i = 0; i < C; i += LANES) {
        vec v = load(x + i);
        if (norm->weight) v *= load(norm->weight + i);
        if (norm->bias) v += load(norm->bias + i);
        store(h + i, v);
    }
    return scale;
}

/* d_h -> d_row, in place, and the gradients of what the norm has learned. */
static void norm_row_backward(const Norm *norm, const float *x, float *d, float scale, int C) {
    for (int i = 0; i < C; i += LANES) {
        vec v = load(d + i);
        if (norm->weight) {
            store(norm->d_weight + i, load(norm->d_weight + i) + v * load(x + i));
            store(d + i, v * load(norm->weight + i));
        }
        if (norm->bias) store(norm->d_bias + i, load(norm->d_bias + i) + v);
    }
    normed_backward(x, d, C, scale);
}

static void add_to(float *total, const float *x, int n) {
    for (int i = 0; i < n; i += LANES) store(total + i, load(total + i) + load(x + i));
}

/* What attention reads: x normed -> h, in a modern layer with a share of the position before, normed -> x + C. */
static float first_norm(const Now *l, int row, float *x, float *h) {
    int C = l->C;
    float scale = norm_row(&l->weights->norm_1, l->kept.x + (size_t)row * C, x, h, C);
    if (l->weights->shift && row % l->T) {
        float *before = x + C;
        norm_row(&l->weights->norm_1, l->kept.x + (size_t)(row - 1) * C, before, before, C);
        for (int i = 0; i < C; i += LANES) store(h + i, load(h + i) + load(before + i) * load(l->weights->shift + i));
    }
    return scale;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Attention: each head of each window by itself, a strip of queries at a time, with those keys only that they may see */

static inline vec larger(vec a, vec b) { return where(a > b, a, b); }

static inline float largest(vec v) {
    float most = v[0];
    for (int j = 1; j < LANES; j++) most = v[j] > most ? v[j] : most;
    return most;
}

static void attend(const Now *l, int b, int h) {
    const Kept *kept = &l->kept;
    const Room *room = &l->scratch.room;
    int T = l->T, C = l->C, D = C / l->H, W = round_up(T, STRIP);
    const num *q = kept->qkv + (size_t)b * T * 3 * C + h * D, *k = q + C, *v = k + C;
    size_t by_position = (size_t)D / PAIR * LANES, by_channel = (size_t)W / PAIR * LANES;
    uint64_t counted = wide(T);
    float scale = 1 / sqrtf(D);
    Dropout weights = l->dropout[WEIGHTS];
    lanes_are_rows(k, 3 * C, T, W, D, room->rows_k, by_position);
    lanes_are_columns(v, 3 * C, T, W, D, room->columns_v, by_channel);
    for (int first = 0; first < T; first += STRIP) {
        int m = rows_of_strip(first, T), seen = first + STRIP;
        rows_times(q + (size_t)first * 3 * C, 3 * C, m, room->rows_k, by_position, seen, D, room->scores, W);
        for (int i = 0; i < m; i++) {
            float *s = room->scores + (size_t)i * W;
            int t = first + i;
            size_t row = ((size_t)b * l->H + h) * T + t;
            vec most = all(-INFINITY), total = {0};
            for (int j = 0; j < seen; j += LANES) {
                vec x = where(lane_numbers() + j > t, all(-INFINITY), load(s + j) * scale);
                most = larger(x, most);
                store(s + j, x);
            }
            float top = largest(most);
            for (int j = 0; j < seen; j += LANES) {
                vec e = where(lane_numbers() + j > t, all(0), exponential(load(s + j) - top));
                total += e;
                store(s + j, e);
            }
            float all_of_it = sum(total);
            kept->total[row] = top + logf(all_of_it);
            for (int j = 0; j < seen; j += LANES)
                to(room->w + (size_t)i * W + j, dropped(&weights, row * counted + j, load(s + j) / all_of_it));
        }
        rows_times(room->w, W, m, room->columns_v, by_channel, D, seen, room->out, D);
        for (int i = 0; i < m; i++)
            round_row(room->out + i * D, kept->y + ((size_t)b * T + first + i) * C + h * D, D);
    }
}

/* A strip of the gradients of queries (which = 0), keys (1) or values (2), from `out` to d_qkv. */
static void store_strip(const Now *l, int b, int h, int first, int m, int which) {
    int C = l->C, D = C / l->H;
    float x[D];
    for (int i = 0; i < m; i++) {
        size_t row = (size_t)b * l->T + first + i, place = row * 3 * C + which * C + h * D;
        float *d = l->scratch.room.out + i * D;
        if (l->cos && which < 2) { /* they were normed, then turned */
            const float *cos = l->cos + (size_t)(first + i) * D, *sin = l->sin + (size_t)(first + i) * D;
            copy_row(l->kept.qkv + place, x, D);
            turn(x, cos, sin, D, -1);
            turn(d, cos, sin, D, -1);
            normed_backward(x, d, D, l->kept.scales[(row * 2 + which) * l->H + h]);
        }
        round_row(d, l->scratch.d_qkv + place, D);
    }
}

/* d_y (R, C) -> d_qkv (R, 3C). The weights are computed again, from what is kept of each row's sum
   (Dao et al. 2022, FlashAttention). */
static void attend_backward(const Now *l, int b, int h) {
    const Kept *kept = &l->kept;
    const Room *room = &l->scratch.room;
    int T = l->T, C = l->C, D = C / l->H, W = round_up(T, STRIP);
    const num *q = kept->qkv + (size_t)b * T * 3 * C + h * D, *k = q + C, *v = k + C;
    const num *d = l->scratch.d_y + (size_t)b * T * C + h * D, *y = kept->y + (size_t)b * T * C + h * D;
    size_t by_position = (size_t)D / PAIR * LANES, by_channel = (size_t)W / PAIR * LANES;
    uint64_t counted = wide(T);
    float scale = 1 / sqrtf(D);
    Dropout weights = l->dropout[WEIGHTS];
    lanes_are_rows(k, 3 * C, T, W, D, room->rows_k, by_position);
    lanes_are_rows(v, 3 * C, T, W, D, room->rows_v, by_position);
    lanes_are_columns(k, 3 * C, T, W, D, room->columns_k, by_channel);
    lanes_are_columns(q, 3 * C, T, W, D, room->columns_q, by_channel);
    lanes_are_columns(d, C, T, W, D, room->columns_d, by_channel);
    for (int first = 0; first < T; first += STRIP) {
        int m = rows_of_strip(first, T), seen = first + STRIP;
        rows_times(q + (size_t)first * 3 * C, 3 * C, m, room->rows_k, by_position, seen, D, room->scores, W);
        rows_times(d + (size_t)first * C, C, m, room->rows_v, by_position, seen, D, room->d_weights, W);
        for (int i = 0; i < m; i++) {
            int t = first + i;
            size_t row = ((size_t)b * l->H + h) * T + t;
            vec along = {0}; /* the sum of each weight times its gradient, which is that of y times its own */
            for (int c = 0; c < D; c += LANES) along += from(d + (size_t)t * C + c) * from(y + (size_t)t * C + c);
            float mean = sum(along), total = kept->total[row];
            for (int j = 0; j < seen; j += LANES) {
                vec w = exponential(load(room->scores + (size_t)i * W + j) * scale - total);
                w = where(lane_numbers() + j > t, all(0), w);
                vec keep = dropped(&weights, row * counted + j, all(1));
                to(room->w + (size_t)i * W + j, w * keep);
                to(room->s + (size_t)i * W + j,
                   w * (load(room->d_weights + (size_t)i * W + j) * keep - mean) * scale);
            }
        }
        size_t at = (size_t)first / PAIR * LANES;
        lanes_are_columns(room->w, W, m, STRIP, seen, room->columns_w + at, by_channel);
        lanes_are_columns(room->s, W, m, STRIP, seen, room->columns_s + at, by_channel);
        rows_times(room->s, W, m, room->columns_k, by_channel, D, seen, room->out, D);
        store_strip(l, b, h, first, m, 0);
    }
    for (int first = 0; first < T; first += STRIP) { /* strips of keys, which are seen by the queries from there on */
        int m = rows_of_strip(first, T), units = (W - first) / PAIR;
        size_t at = (size_t)first / PAIR * LANES, panel = first / LANES * by_channel + at;
        columns_times(
            room->columns_s + panel, by_channel, STRIP, room->columns_q + at, by_channel, D, units, room->out, D, 0);
        store_strip(l, b, h, first, m, 1);
        columns_times(
            room->columns_w + panel, by_channel, STRIP, room->columns_d + at, by_channel, D, units, room->out, D, 0);
        store_strip(l, b, h, first, m, 2);
    }
}

/* ---------------------------------------------------------------------------------------------------------------------
   The layer */

/* What stands between the two products of an MLP: GELU or ReLU squared. *slope: its derivative. */
static inline vec bend(const Now *l, vec x, vec *slope) {
    if (l->modern) {
        vec above = where(x < 0.0f, all(0), x);
        *slope = 2 * above;
        return above * above;
    }
    vec gate = gelu_gate(x), bent = x * gate;
    *slope = gate + bent * (1 - gate) * 1.5957691216f * (1 + 0.134145f * x * x);
    return bent;
}

/* x + dropout(product + bias), in place of product. */
static void add_sum(const Now *l, const Linear *linear, Dropout *dropout, size_t row, const float *x, float *product) {
    for (int i = 0; i < l->C; i += LANES) {
        vec v = load(product + i);
        if (linear->bias) v += load(linear->bias + i);
        store(product + i, load(x + i) + dropped(dropout, row * l->C + i, v));
    }
}

static void layer_forward(const Now *l) {
    int R = l->R, C = l->C, D = C / l->H;
    size_t panel = (size_t)round_up(R, STRIP) / PAIR * LANES;
    Kept kept = l->kept;
    Scratch s = l->scratch;
    Dropout first_sum = l->dropout[FIRST_SUM], second_sum = l->dropout[SECOND_SUM];
    for (int first = 0; first < R; first += STRIP) {
        int m = rows_of_strip(first, R);
        for (int i = 0; i < m; i++) {
            first_norm(l, first + i, s.row, s.h);
            round_row(s.h, s.strip + i * C, C);
        }
        linear(&l->weights->attn, s.strip, m, s.product);
        for (int i = 0; i < m; i++) {
            float *qkv = s.product + i * 3 * C;
            size_t row = first + i, t = row % l->T;
            if (l->weights->attn.bias) add_to(qkv, l->weights->attn.bias, 3 * C);
            if (l->cos)
                for (int h = 0; h < 2 * l->H; h++) {
                    kept.scales[row * 2 * l->H + h] = normed(qkv + h * D, D);
                    turn(qkv + h * D, l->cos + t * D, l->sin + t * D, D, 1);
                }
            round_row(qkv, kept.qkv + row * 3 * C, 3 * C);
        }
    }
    for (int b = 0; b < R / l->T; b++)
        for (int h = 0; h < l->H; h++) attend(l, b, h);
    for (int first = 0; first < R; first += STRIP) {
        int m = rows_of_strip(first, R);
        linear(&l->weights->attn_proj, kept.y + (size_t)first * C, m, s.product);
        for (int i = 0; i < m; i++) {
            size_t row = first + i;
            copy_row(l->kept.x + row * C, s.h, C);
            add_sum(l, &l->weights->attn_proj, &first_sum, row, s.h, s.product + i * C);
            round_row(s.product + i * C, kept.middle + row * C, C);
            norm_row(&l->weights->norm_2, kept.middle + row * C, s.row, s.h, C);
            round_row(s.h, s.strip + i * C, C);
        }
        linear(&l->weights->fc, s.strip, m, s.product);
        for (int i = 0; i < m; i++)
            for (int c = 0; c < 4 * C; c += LANES) {
                vec slope, v = load(s.product + i * 4 * C + c);
                if (l->weights->fc.bias) v += load(l->weights->fc.bias + c);
                to(s.strip + i * 4 * C + c, bend(l, v, &slope));
                to(kept.slope + (size_t)(first + i) * 4 * C + c, slope);
            }
        lanes_are_columns(s.strip, 4 * C, m, STRIP, 4 * C, kept.bent + (size_t)first / PAIR * LANES, panel);
        linear(&l->weights->fc_proj, s.strip, m, s.product);
        for (int i = 0; i < m; i++) {
            size_t row = first + i;
            copy_row(kept.middle + row * C, s.h, C);
            add_sum(l, &l->weights->fc_proj, &second_sum, row, s.h, s.product + i * C);
            round_row(s.product + i * C, l->out + row * C, C);
        }
    }
}

/* Of a strip of the gradient of a sum (m, C): the part that went through dropout -> d (m, C), its panels, and the
   gradient of the bias. */
static void dropped_backward(
    const Now *l, const Linear *linear, Dropout *dropout, int first, int m, const num *d_sum, num *d, unit *panels,
    size_t panel) {
    int C = l->C;
    for (int i = 0; i < m; i++)
        for (int c = 0; c < C; c += LANES) {
            size_t at = (size_t)(first + i) * C + c;
            vec v = dropped(dropout, at, from(d_sum + at));
            if (linear->bias) store(linear->d_bias + c, load(linear->d_bias + c) + v);
            to(d + i * C + c, v);
        }
    lanes_are_columns(d, C, m, STRIP, C, panels + (size_t)first / PAIR * LANES, panel);
}

/* d_x: the gradient of what the layer made, in whose place comes that of what it read. */
static void layer_backward(const Now *l, num *d_x) {
    int R = l->R, C = l->C, filled = round_up(R, STRIP);
    size_t panel = (size_t)filled / PAIR * LANES;
    Kept kept = l->kept;
    Scratch s = l->scratch;
    Dropout first_sum = l->dropout[FIRST_SUM], second_sum = l->dropout[SECOND_SUM];
    for (int first = 0; first < R; first += STRIP) {
        int m = rows_of_strip(first, R);
        size_t at = (size_t)first / PAIR * LANES;
        dropped_backward(l, &l->weights->fc_proj, &second_sum, first, m, d_x, s.strip, s.d_sum, panel);
        linear_backward(&l->weights->fc_proj, s.strip, m, s.product);
        for (int i = 0; i < m; i++)
            for (int c = 0; c < 4 * C; c += LANES) {
                size_t j = (size_t)i * 4 * C + c;
                vec d = load(s.product + j) * from(kept.slope + (size_t)first * 4 * C + j);
                if (l->weights->fc.bias) store(l->weights->fc.d_bias + c, load(l->weights->fc.d_bias + c) + d);
                to(s.strip + j, d);
            }
        lanes_are_columns(s.strip, 4 * C, m, STRIP, 4 * C, s.d_wide + at, panel);
        linear_backward(&l->weights->fc, s.strip, m, s.product);
        for (int i = 0; i < m; i++) {
            size_t row = first + i;
            float *d = s.product + i * C;
            float scale = norm_row(&l->weights->norm_2, kept.middle + row * C, s.row, s.h, C);
            norm_row_backward(&l->weights->norm_2, s.row, d, scale, C);
            for (int c = 0; c < C; c += LANES)
                to(s.d_middle + row * C + c, load(d + c) + from(d_x + row * C + c));
            round_row(s.h, s.strip + i * C, C);
        }
        lanes_are_columns(s.strip, C, m, STRIP, C, s.in + at, panel);
    }
    weight_gradient(&l->weights->fc_proj, s.d_sum, kept.bent, filled, l->add);
    weight_gradient(&l->weights->fc, s.d_wide, s.in, filled, l->add);

    for (int first = 0; first < R; first += STRIP) {
        int m = rows_of_strip(first, R);
        dropped_backward(l, &l->weights->attn_proj, &first_sum, first, m, s.d_middle, s.strip, s.d_sum, panel);
        linear_backward(&l->weights->attn_proj, s.strip, m, s.product);
        round_row(s.product, s.d_y + (size_t)first * C, m * C);
        lanes_are_columns(kept.y + (size_t)first * C, C, m, STRIP, C, s.in + (size_t)first / PAIR * LANES, panel);
    }
    weight_gradient(&l->weights->attn_proj, s.d_sum, s.in, filled, l->add);

    for (int b = 0; b < R / l->T; b++)
        for (int h = 0; h < l->H; h++) attend_backward(l, b, h);

    const float *shift = l->weights->shift;
    float *d_shift = l->weights->d_shift;
    for (int first = (R - 1) / STRIP * STRIP; first >= 0; first -= STRIP) { /* backwards: see `after` */
        int m = rows_of_strip(first, R);
        size_t at = (size_t)first / PAIR * LANES;
        num *d_qkv = s.d_qkv + (size_t)first * 3 * C;
        if (l->weights->attn.bias)
            for (int i = 0; i < m; i++)
                for (int c = 0; c < 3 * C; c += LANES)
                    store(l->weights->attn.d_bias + c, load(l->weights->attn.d_bias + c) + from(d_qkv + i * 3 * C + c));
        lanes_are_columns(d_qkv, 3 * C, m, STRIP, 3 * C, s.d_in + at, panel);
        linear_backward(&l->weights->attn, d_qkv, m, s.product);
        float *after = s.product + STRIP * C, *start = after + C; /* the first row of the strip behind, and of this */
        memcpy(start, s.product, C * sizeof *start);
        for (int i = 0; i < m; i++) {
            size_t row = first + i;
            float *d = s.product + i * C, *next = i + 1 < m ? d + C : after, scale = first_norm(l, row, s.row, s.h);
            if (shift)
                for (int c = 0; c < C; c += LANES) {
                    if (row % l->T) store(d_shift + c, load(d_shift + c) + load(d + c) * load(s.row + C + c));
                    if ((row + 1) % l->T) store(d + c, load(d + c) + load(next + c) * load(shift + c));
                }
            norm_row_backward(&l->weights->norm_1, s.row, d, scale, C);
            for (int c = 0; c < C; c += LANES) to(d_x + row * C + c, load(d + c) + from(s.d_middle + row * C + c));
            round_row(s.h, s.strip + i * C, C);
        }
        memcpy(after, start, C * sizeof *start);
        lanes_are_columns(s.strip, C, m, STRIP, C, s.in + at, panel);
    }
    weight_gradient(&l->weights->attn, s.d_in, s.in, filled, l->add);
}

/* ---------------------------------------------------------------------------------------------------------------------
   The model: the vectors of its tokens, all layers, the loss */

/* Which vectors those runs of 2, 3, ... ngram tokens have that end with the t-th of a window: modern.NGrams.rows. */
static void find_runs(const Model *model, const int64_t *idx, int t, size_t *rows) {
    int64_t number = 0;
    for (int back = 0; back < model->ngram; back++) {
        number += ((back > t ? -1 : idx[t - back]) + 2) * model->factors[back];
        if (back) rows[back - 1] = number % 2147483647 % model->ngram_rows;
    }
}

/* What the first layer reads of a row, before dropout -> x; which runs there are -> runs. Returns by how much a modern
   model's norm multiplied it. */
static float embed(const Model *model, const Pass *pass, size_t row, float *x, size_t *runs) {
    size_t C = model->C, t = row % pass->T;
    memcpy(x, model->wte + pass->idx[row] * C, C * sizeof *x);
    if (model->wpe) add_to(x, model->wpe + t * C, C);
    if (model->ngrams) find_runs(model, pass->idx + row - t, t, runs);
    for (int n = 0; n < model->ngram - 1; n++) add_to(x, model->ngrams + runs[n] * C, C);
    return model->modern ? normed(x, C) : 1;
}

static void embed_backward(const Model *model, const Pass *pass, const num *d_x, Scratch s) {
    size_t C = model->C, runs[LONGEST];
    float *d = s.h;
    Dropout first = dropout(pass, 0);
    for (size_t row = 0; row < (size_t)pass->B * pass->T; row++) {
        for (size_t c = 0; c < C; c += LANES)
            store(d + c, dropped(&first, row * C + c, from(d_x + row * C + c)));
        if (model->modern) {
            float scale = embed(model, pass, row, s.row, runs);
            normed_backward(s.row, d, C, scale);
        }
        add_to(model->d_wte + pass->idx[row] * C, d, C);
        if (model->wpe) add_to(model->d_wpe + row % pass->T * C, d, C);
        for (int n = 0; n < model->ngram - 1; n++) add_to(model->d_ngrams + runs[n] * C, d, C);
    }
}

/* The cross-entropy of V logits z, in nats; in their place comes its gradient times `weight`, and 0 up to wide(V).
   cap: none, or 0; with it they are first bent to stay below it. A target of -1 has none. */
static float cross_entropy(float *z, int V, int64_t target, float cap, float weight) {
    int filled = wide(V);
    if (target < 0) {
        memset(z, 0, filled * sizeof *z);
        return 0;
    }
    if (cap > 0)
        for (int j = 0; j < V; j += LANES) /* cap tanh(z / cap) */
            store(z + j, cap - 2 * cap / (1 + exponential(load(z + j) * (2 / cap))));
    for (int j = V; j < filled; j++) z[j] = -INFINITY;
    vec most = all(-INFINITY), total = {0};
    for (int j = 0; j < V; j += LANES) most = larger(load(z + j), most);
    float top = largest(most), of_target = z[target];
    for (int j = 0; j < V; j += LANES) total += exponential(load(z + j) - top);
    float log_of_all = top + logf(sum(total)), slope = cap > 0 ? 1 / (cap * cap) : 0;
    for (int j = 0; j < V; j += LANES) {
        vec v = load(z + j);
        store(z + j, weight * exponential(v - log_of_all) * (1 - slope * v * v));
    }
    z[target] -= weight * (1 - slope * of_target * of_target);
    memset(z + V, 0, (filled - V) * sizeof *z);
    return log_of_all - of_target;
}

/* Which token the n-th foretold one of a row is: 0 is the next one. -1 where it is not known. */
static int64_t target_of(const Pass *pass, size_t row, int n) {
    return row % pass->T + n < (size_t)pass->T ? pass->targets[row + n] : -1;
}

/* The loss of what the last layer made, x (R, C) -> d_x (R, C), and the gradients of the last norm and the head. */
static float foretell(const Model *model, const Pass *pass, const num *x, num *d_x, Scratch s) {
    int R = pass->B * pass->T, C = model->C, filled = round_up(R, STRIP), N = model->head.N;
    size_t panel = (size_t)filled / PAIR * LANES;
    int known = 0, further = 0;
    for (int row = 0; row < R; row++)
        for (int n = 0; n < model->foretold; n++) *(n ? &further : &known) += target_of(pass, row, n) >= 0;
    double loss = 0;
    for (int first = 0; first < R; first += STRIP) {
        int m = rows_of_strip(first, R);
        size_t at = (size_t)first / PAIR * LANES;
        for (int i = 0; i < m; i++) {
            norm_row(&model->norm, x + (size_t)(first + i) * C, s.row, s.h, C);
            round_row(s.h, s.strip + i * C, C);
        }
        lanes_are_columns(s.strip, C, m, STRIP, C, s.in + at, panel);
        linear(&model->head, s.strip, m, s.product);
        for (int i = 0; i < m; i++) {
            float *z = s.product + (size_t)i * N;
            loss += cross_entropy(
                z, model->V, target_of(pass, first + i, 0), model->modern ? 15 : 0, pass->share / known);
            for (int n = 1; n < model->foretold; n++)
                cross_entropy(z + n * wide(model->V), model->V, target_of(pass, first + i, n), 0,
                              pass->share * pass->ahead_share / further);
            round_row(z, s.strip + (size_t)i * N, N);
        }
        lanes_are_columns(s.strip, N, m, STRIP, N, s.d_wide + at, panel);
        linear_backward(&model->head, s.strip, m, s.product);
        for (int i = 0; i < m; i++) {
            float *d = s.product + i * C, scale = norm_row(&model->norm, x + (size_t)(first + i) * C, s.row, s.h, C);
            norm_row_backward(&model->norm, s.row, d, scale, C);
            round_row(d, d_x + (size_t)(first + i) * C, C);
        }
    }
    for (int n = 0; n < model->foretold; n++) {
        Linear one = {.N = model->V, .K = C, .d_weight = model->head.d_weight + (size_t)n * model->V * C};
        weight_gradient(&one, s.d_wide + n * wide(model->V) / LANES * panel, s.in, filled, pass->add);
    }
    return pass->share * loss / known;
}

/* How many bytes pass->kept and pass->scratch must have. */
void sizes(const Model *model, const Pass *pass, int64_t *kept, int64_t *scratch) {
    *kept = model->layers * (keep(model, pass, NULL).end - (char *)NULL);
    *scratch = make_scratch(model, pass, NULL).end - (char *)NULL;
}

/* The loss times pass->share; adds its gradients. Returns 1 where a token is none of the V, else 0. */
int learn(const Model *model, const Pass *pass, float *loss) {
    int R = pass->B * pass->T;
    for (int row = 0; row < R; row++)
        if ((uint64_t)pass->idx[row] >= (uint64_t)model->V || pass->targets[row] < -1 || pass->targets[row] >= model->V)
            return 1;
    Scratch s = make_scratch(model, pass, pass->scratch);
    Now layers[model->layers];
    char *place = pass->kept;
    for (int i = 0; i < model->layers; i++) {
        Now *l = &layers[i];
        *l = (Now){.weights = &model->layer[i], .cos = model->cos, .sin = model->sin, .kept = keep(model, pass, place)};
        l->R = R, l->T = pass->T, l->C = model->C, l->H = model->H, l->modern = model->modern, l->add = pass->add;
        for (int n = 0; n < 3; n++) l->dropout[n] = dropout(pass, 1 + 3 * i + n);
        l->scratch = s;
        place = l->kept.end;
        l->out = i + 1 < model->layers ? keep(model, pass, place).x : s.out;
    }
    Dropout first = dropout(pass, 0);
    for (int row = 0; row < R; row++) {
        size_t runs[LONGEST];
        embed(model, pass, row, s.h, runs);
        for (int c = 0; c < model->C; c += LANES) {
            size_t at = (size_t)row * model->C + c;
            to(layers[0].kept.x + at, dropped(&first, at, load(s.h + c)));
        }
    }
    for (int i = 0; i < model->layers; i++) layer_forward(&layers[i]);
    *loss = foretell(model, pass, s.out, s.d_x, s);
    for (int i = model->layers - 1; i >= 0; i--) layer_backward(&layers[i], s.d_x);
    embed_backward(model, pass, s.d_x, s);
    return 0;
}
