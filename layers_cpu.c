/* The layers of a GPT while it learns on a CPU: layers_cpu.py says of which model, and checks that it is right.

PyTorch takes some 120 operations for a layer, forward and backward, and each writes to memory what the next reads
again. Here all layers are two calls, forward() and backward(), of one thread; other threads have other windows. Between
two products of matrices all is done with a STRIP of positions at a time, which stay in the cache.

R = B * T rows: T positions of each of B windows. Numbers that are multiplied, and those kept for the way back, are
`num`: float32, or bfloat16 where compiled with -DBFLOAT16. All else is float32.

    forward     x -> norm -> c_attn -> attention -> c_proj, added to x -> norm -> c_fc -> bent -> c_proj, added -> out
    backward    d_out -> the same from its end to its beginning -> d_x, and the gradients of all weights, added up

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

/* What layers_cpu.py fills in; its classes have the same fields in the same order. */

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
    int32_t C, H;
    int32_t modern;           /* modern.Block, not model.Block */
    Linear attn, attn_proj, fc, fc_proj;
    Norm norm_1, norm_2;
    const float *shift;       /* (C,): how much of the position before flows in; or NULL */
    float *d_shift;
    const float *cos, *sin;   /* (T, D): queries and keys are normed and turned; or NULL */
    /* What prepared() fills in, from the Pass: */
    int32_t B, T, threshold, add;
    const int64_t *seeds;     /* (3,): of the dropout, see WEIGHTS */
    const num *x;             /* (R, C) */
    num *out;
    char *kept;
} Layer;

typedef struct {
    int32_t B, T, layers;
    int32_t threshold;        /* of 256: how many numbers dropout sets to zero */
    int32_t add;              /* are gradients of matrices added to what is there? those of vectors always are */
    const int64_t *seeds;     /* (layers, 3) */
    const num *x, *d_out;     /* (R, C): what the first layer reads, and the gradient of what the last one makes */
    num *out, *d_x;           /* (R, C) */
    char *kept, *scratch;     /* as large as sizes() says */
} Pass;

/* What backward() needs of forward(), besides x. */
typedef struct {
    num *qkv;      /* (R, 3, H, D), normed and turned where they are */
    num *y;        /* (R, C): what attention gathered */
    num *middle;   /* (R, C): x behind attention */
    num *wide;     /* (R, 4C): before it is bent */
    float *total;  /* (B, H, T): log of the sum of e^score */
    float *scales; /* (R, 2, H): by how much norming multiplied queries and keys */
    num *out;      /* (R, C): what the layer made, for the next one */
    char *end;
} Kept;

static void *take(char **place, size_t bytes) {
    char *here = *place;
    *place += (bytes + 63) / 64 * 64;
    return here;
}

static int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

/* How many rows the strip has that begins at `first`, of `all` rows. */
static int rows_of_strip(int first, int all) { return all - first < STRIP ? all - first : STRIP; }

static Kept keep(const Layer *l, char *place) {
    size_t R = round_up(l->B * l->T, STRIP), C = l->C; /* tiles read some rows too many */
    Kept k;
    k.qkv = take(&place, 3 * R * C * sizeof(num));
    k.y = take(&place, R * C * sizeof(num));
    k.middle = take(&place, R * C * sizeof(num));
    k.wide = take(&place, 4 * R * C * sizeof(num));
    k.total = take(&place, R * l->H * sizeof(float));
    k.scales = take(&place, 2 * R * l->H * sizeof(float));
    k.out = take(&place, R * C * sizeof(num));
    k.end = place;
    return k;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Products */

/* ROWS x (wide * LANES) sums over K units: A's r-th row begins at A + r * row and goes on by `step`. */
static inline __attribute__((always_inline)) void tile(
    const unit *A, size_t row, const size_t step, const unit *B, size_t panel, int K, float *Y, size_t ld, int add,
    const int wide) {
    vec sums[ROWS][2] = {{{0}}};
    for (int k = 0; k < K; k++) {
        ints b[2];
        for (int j = 0; j < wide; j++) memcpy(&b[j], B + j * panel + (size_t)k * LANES, sizeof b[j]);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < wide; j++) sums[r][j] = multiplied(sums[r][j], A[r * row + k * step], b[j]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < wide; j++) {
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

/* Lay out rows `first` to `first` + R - 1 of a weight (N, K) from the R given, for Linear.forward and .backward. */
void lay_out(const num *weight, int R, int N, int K, int first, unit *forward, unit *backward) {
    lanes_are_rows(weight, K, R, R, K, forward + (size_t)first * K / PAIR, (size_t)K / PAIR * LANES);
    lanes_are_columns(weight, K, R, R, K, backward + (size_t)first / PAIR * LANES, (size_t)N / PAIR * LANES);
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

enum { WEIGHTS, FIRST_SUM, SECOND_SUM }; /* where there is dropout: in attention, and before each addition to x */

/* Mix the bits of each number (Wellons 2018, "Prospecting for hash functions", lowbias32). */
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
static inline bits mixed(bits x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* With what dropout multiplies LANES numbers from the i-th on: 0, or what keeps their mean. Each is decided by a number
   that is made of i and the seed alone, so that backward() decides as forward() did; as in model.dropout by 8 bits. */
static inline vec survivors(const Layer *l, int place, uint64_t i) {
    bits x = mixed((bits)lane_numbers() + (uint32_t)(i + l->seeds[place]));
    x = mixed(x + (uint32_t)(l->seeds[place] >> 32) + (uint32_t)(i >> 32));
    ints kept = (ints)(x >> 24) >= l->threshold;
    return where(kept, all(256.0f / (256 - l->threshold)), all(0));
}

static inline vec dropped(const Layer *l, int place, uint64_t i, vec v) {
    return l->threshold ? v * survivors(l, place, i) : v;
}

/* What dropout multiplies the first n numbers with, for layers_cpu.py's trial. */
void masks(const Pass *pass, int place, int64_t n, float *out) {
    Layer l = {.threshold = pass->threshold, .seeds = pass->seeds};
    for (int64_t i = 0; i < n; i += LANES) store(out + i, survivors(&l, place, i));
}

/* In attention numbers are counted in rows of so many. */
int mask_width(int T) { return round_up(T, 16); }

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
static float first_norm(const Layer *l, int row, float *x, float *h) {
    int C = l->C;
    float scale = norm_row(&l->norm_1, l->x + (size_t)row * C, x, h, C);
    if (l->shift && row % l->T) {
        float *before = x + C;
        norm_row(&l->norm_1, l->x + (size_t)(row - 1) * C, before, before, C);
        for (int i = 0; i < C; i += LANES) store(h + i, load(h + i) + load(before + i) * load(l->shift + i));
    }
    return scale;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Attention: each head of each window by itself, a strip of queries at a time, with those keys only that they may see */

typedef struct {
    unit *rows_k, *rows_v, *columns_k, *columns_v, *columns_q, *columns_d; /* in panels: (T, D) each */
    unit *columns_w, *columns_s;             /* (T, T): weights and the scores' gradients */
    float *scores, *d_weights, *out;         /* (STRIP, T), (STRIP, T), (STRIP, D) */
    num *w, *s;                              /* (STRIP, T) */
} Room;

static Room make_room(const Layer *l, char **place) {
    size_t T = round_up(l->T, STRIP), C = l->C, D = C / l->H;
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

static inline vec larger(vec a, vec b) { return where(a > b, a, b); }

static void attend(const Layer *l, const Kept *kept, const Room *room, int b, int h) {
    int T = l->T, C = l->C, D = C / l->H, W = round_up(T, STRIP);
    const num *q = kept->qkv + (size_t)b * T * 3 * C + h * D, *k = q + C, *v = k + C;
    size_t by_position = (size_t)D / PAIR * LANES, by_channel = (size_t)W / PAIR * LANES;
    float scale = 1 / sqrtf(D);
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
            float top = most[0];
            for (int j = 1; j < LANES; j++) top = most[j] > top ? most[j] : top;
            for (int j = 0; j < seen; j += LANES) {
                vec e = where(lane_numbers() + j > t, all(0), exponential(load(s + j) - top));
                total += e;
                store(s + j, e);
            }
            float all_of_it = sum(total);
            kept->total[row] = top + logf(all_of_it);
            for (int j = 0; j < seen; j += LANES)
                to(room->w + (size_t)i * W + j,
                   dropped(l, WEIGHTS, row * mask_width(T) + j, load(s + j) / all_of_it));
        }
        rows_times(room->w, W, m, room->columns_v, by_channel, D, seen, room->out, D);
        for (int i = 0; i < m; i++)
            round_row(room->out + i * D, kept->y + ((size_t)b * T + first + i) * C + h * D, D);
    }
}

/* A strip of the gradients of queries (which = 0), keys (1) or values (2), from `out` to d_qkv. */
static void store_strip(
    const Layer *l, const Kept *kept, const Room *room, num *d_qkv, int b, int h, int first, int m, int which) {
    int C = l->C, D = C / l->H;
    float x[D];
    for (int i = 0; i < m; i++) {
        size_t row = (size_t)b * l->T + first + i, place = row * 3 * C + which * C + h * D;
        float *d = room->out + i * D;
        if (l->cos && which < 2) { /* they were normed, then turned */
            const float *cos = l->cos + (size_t)(first + i) * D, *sin = l->sin + (size_t)(first + i) * D;
            copy_row(kept->qkv + place, x, D);
            turn(x, cos, sin, D, -1);
            turn(d, cos, sin, D, -1);
            normed_backward(x, d, D, kept->scales[(row * 2 + which) * l->H + h]);
        }
        round_row(d, d_qkv + place, D);
    }
}

/* d_y (R, C) -> d_qkv (R, 3C). The weights are computed again, from what is kept of each row's sum
   (Dao et al. 2022, FlashAttention). */
static void attend_backward(
    const Layer *l, const Kept *kept, const Room *room, const num *d_y, num *d_qkv, int b, int h) {
    int T = l->T, C = l->C, D = C / l->H, W = round_up(T, STRIP);
    const num *q = kept->qkv + (size_t)b * T * 3 * C + h * D, *k = q + C, *v = k + C;
    const num *d = d_y + (size_t)b * T * C + h * D, *y = kept->y + (size_t)b * T * C + h * D;
    size_t by_position = (size_t)D / PAIR * LANES, by_channel = (size_t)W / PAIR * LANES;
    float scale = 1 / sqrtf(D);
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
                vec keep = dropped(l, WEIGHTS, row * mask_width(T) + j, all(1));
                to(room->w + (size_t)i * W + j, w * keep);
                to(room->s + (size_t)i * W + j,
                   w * (load(room->d_weights + (size_t)i * W + j) * keep - mean) * scale);
            }
        }
        size_t at = (size_t)first / PAIR * LANES;
        lanes_are_columns(room->w, W, m, STRIP, seen, room->columns_w + at, by_channel);
        lanes_are_columns(room->s, W, m, STRIP, seen, room->columns_s + at, by_channel);
        rows_times(room->s, W, m, room->columns_k, by_channel, D, seen, room->out, D);
        store_strip(l, kept, room, d_qkv, b, h, first, m, 0);
    }
    for (int first = 0; first < T; first += STRIP) { /* strips of keys, which are seen by the queries from there on */
        int m = rows_of_strip(first, T), units = (W - first) / PAIR;
        size_t at = (size_t)first / PAIR * LANES, panel = first / LANES * by_channel + at;
        columns_times(
            room->columns_s + panel, by_channel, STRIP, room->columns_q + at, by_channel, D, units, room->out, D, 0);
        store_strip(l, kept, room, d_qkv, b, h, first, m, 1);
        columns_times(
            room->columns_w + panel, by_channel, STRIP, room->columns_d + at, by_channel, D, units, room->out, D, 0);
        store_strip(l, kept, room, d_qkv, b, h, first, m, 2);
    }
}

/* ---------------------------------------------------------------------------------------------------------------------
   The layer */

static inline vec bent(const Layer *l, vec x) {
    if (l->modern) return where(x < 0.0f, all(0), x * x);
    return x * gelu_gate(x);
}

/* The derivative of bent; *value: bent(x). */
static inline vec slope(const Layer *l, vec x, vec *value) {
    if (l->modern) {
        vec above = where(x < 0.0f, all(0), x);
        *value = above * above;
        return 2 * above;
    }
    vec gate = gelu_gate(x);
    *value = x * gate;
    return gate + *value * (1 - gate) * 1.5957691216f * (1 + 0.134145f * x * x);
}

typedef struct {
    Room room;
    float *row, *h;                           /* (2, C), (C,) */
    float *product;                           /* (STRIP, 4C) */
    num *strip;                               /* (STRIP, 4C) */
    num *d_middle, *d_y, *d_qkv;              /* (R, C), (R, C), (R, 3C) */
    unit *in, *d_in, *bent, *d_wide, *d_sum;  /* panels: (R, C), (R, 3C), (R, 4C), (R, 4C), (R, C) */
    char *end;
} Scratch;

static Scratch make_scratch(const Layer *l, char *place) {
    size_t R = round_up(l->B * l->T, STRIP), C = l->C;
    Scratch s;
    s.room = make_room(l, &place);
    s.row = take(&place, 2 * C * sizeof(float));
    s.h = take(&place, C * sizeof(float));
    s.product = take(&place, STRIP * 4 * C * sizeof(float));
    s.strip = take(&place, STRIP * 4 * C * sizeof(num));
    s.d_middle = take(&place, R * C * sizeof(num));
    s.d_y = take(&place, R * C * sizeof(num));
    s.d_qkv = take(&place, 3 * R * C * sizeof(num));
    s.in = take(&place, R * C * sizeof(num));
    s.d_sum = take(&place, R * C * sizeof(num));
    s.bent = take(&place, 4 * R * C * sizeof(num));
    s.d_wide = take(&place, 4 * R * C * sizeof(num));
    s.d_in = s.d_wide; /* which is no longer needed then */
    s.end = place;
    return s;
}

/* x + dropout(product + bias), in place of product. */
static void add_sum(const Layer *l, const Linear *linear, int place, size_t row, const float *x, float *product) {
    for (int i = 0; i < l->C; i += LANES) {
        vec v = load(product + i);
        if (linear->bias) v += load(linear->bias + i);
        store(product + i, load(x + i) + dropped(l, place, row * l->C + i, v));
    }
}

static void layer_forward(const Layer *l, char *scratch) {
    int R = l->B * l->T, C = l->C, D = C / l->H;
    Kept kept = keep(l, l->kept);
    Scratch s = make_scratch(l, scratch);
    for (int first = 0; first < R; first += STRIP) {
        int m = rows_of_strip(first, R);
        for (int i = 0; i < m; i++) {
            first_norm(l, first + i, s.row, s.h);
            round_row(s.h, s.strip + i * C, C);
        }
        linear(&l->attn, s.strip, m, s.product);
        for (int i = 0; i < m; i++) {
            float *qkv = s.product + i * 3 * C;
            size_t row = first + i, t = row % l->T;
            if (l->attn.bias) add_to(qkv, l->attn.bias, 3 * C);
            if (l->cos)
                for (int h = 0; h < 2 * l->H; h++) {
                    kept.scales[row * 2 * l->H + h] = normed(qkv + h * D, D);
                    turn(qkv + h * D, l->cos + t * D, l->sin + t * D, D, 1);
                }
            round_row(qkv, kept.qkv + row * 3 * C, 3 * C);
        }
    }
    for (int b = 0; b < l->B; b++)
        for (int h = 0; h < l->H; h++) attend(l, &kept, &s.room, b, h);
    for (int first = 0; first < R; first += STRIP) {
        int m = rows_of_strip(first, R);
        linear(&l->attn_proj, kept.y + (size_t)first * C, m, s.product);
        for (int i = 0; i < m; i++) {
            size_t row = first + i;
            copy_row(l->x + row * C, s.h, C);
            add_sum(l, &l->attn_proj, FIRST_SUM, row, s.h, s.product + i * C);
            round_row(s.product + i * C, kept.middle + row * C, C);
            norm_row(&l->norm_2, kept.middle + row * C, s.row, s.h, C);
            round_row(s.h, s.strip + i * C, C);
        }
        linear(&l->fc, s.strip, m, s.product);
        for (int i = 0; i < m; i++)
            for (int c = 0; c < 4 * C; c += LANES) {
                vec v = load(s.product + i * 4 * C + c);
                if (l->fc.bias) v += load(l->fc.bias + c);
                to(kept.wide + (size_t)(first + i) * 4 * C + c, v);
                to(s.strip + i * 4 * C + c, bent(l, v));
            }
        linear(&l->fc_proj, s.strip, m, s.product);
        for (int i = 0; i < m; i++) {
            size_t row = first + i;
            copy_row(kept.middle + row * C, s.h, C);
            add_sum(l, &l->fc_proj, SECOND_SUM, row, s.h, s.product + i * C);
            round_row(s.product + i * C, l->out + row * C, C);
        }
    }
}

/* Of a strip of the gradient of a sum (m, C): the part that went through dropout -> d (m, C), its panels, and the
   gradient of the bias. */
static void dropped_backward(
    const Layer *l, const Linear *linear, int place, int first, int m, const num *d_sum, num *d, unit *panels,
    size_t panel) {
    int C = l->C;
    for (int i = 0; i < m; i++)
        for (int c = 0; c < C; c += LANES) {
            size_t at = (size_t)(first + i) * C + c;
            vec v = dropped(l, place, at, from(d_sum + at));
            if (linear->bias) store(linear->d_bias + c, load(linear->d_bias + c) + v);
            to(d + i * C + c, v);
        }
    lanes_are_columns(d, C, m, STRIP, C, panels + (size_t)first / PAIR * LANES, panel);
}

/* d_out and d_x may be the same place. */
static void layer_backward(const Layer *l, const num *d_out, num *d_x, char *scratch) {
    int R = l->B * l->T, C = l->C, filled = round_up(R, STRIP);
    size_t panel = (size_t)filled / PAIR * LANES;
    Kept kept = keep(l, l->kept);
    Scratch s = make_scratch(l, scratch);
    for (int first = 0; first < R; first += STRIP) {
        int m = rows_of_strip(first, R);
        size_t at = (size_t)first / PAIR * LANES;
        dropped_backward(l, &l->fc_proj, SECOND_SUM, first, m, d_out, s.strip, s.d_sum, panel);
        linear_backward(&l->fc_proj, s.strip, m, s.product);
        num *wide = kept.wide + (size_t)first * 4 * C; /* its gradient takes s.strip, what comes of it its place */
        for (int i = 0; i < m; i++)
            for (int c = 0; c < 4 * C; c += LANES) {
                size_t j = (size_t)i * 4 * C + c;
                vec value, d = load(s.product + j) * slope(l, from(wide + j), &value);
                if (l->fc.bias) store(l->fc.d_bias + c, load(l->fc.d_bias + c) + d);
                to(s.strip + j, d);
                to(wide + j, value);
            }
        lanes_are_columns(wide, 4 * C, m, STRIP, 4 * C, s.bent + at, panel);
        lanes_are_columns(s.strip, 4 * C, m, STRIP, 4 * C, s.d_wide + at, panel);
        linear_backward(&l->fc, s.strip, m, s.product);
        for (int i = 0; i < m; i++) {
            size_t row = first + i;
            float *d = s.product + i * C;
            float scale = norm_row(&l->norm_2, kept.middle + row * C, s.row, s.h, C);
            norm_row_backward(&l->norm_2, s.row, d, scale, C);
            for (int c = 0; c < C; c += LANES)
                to(s.d_middle + row * C + c, load(d + c) + from(d_out + row * C + c));
            round_row(s.h, s.strip + i * C, C);
        }
        lanes_are_columns(s.strip, C, m, STRIP, C, s.in + at, panel);
    }
    weight_gradient(&l->fc_proj, s.d_sum, s.bent, filled, l->add);
    weight_gradient(&l->fc, s.d_wide, s.in, filled, l->add);

    for (int first = 0; first < R; first += STRIP) {
        int m = rows_of_strip(first, R);
        dropped_backward(l, &l->attn_proj, FIRST_SUM, first, m, s.d_middle, s.strip, s.d_sum, panel);
        linear_backward(&l->attn_proj, s.strip, m, s.product);
        round_row(s.product, s.d_y + (size_t)first * C, m * C);
        lanes_are_columns(kept.y + (size_t)first * C, C, m, STRIP, C, s.in + (size_t)first / PAIR * LANES, panel);
    }
    weight_gradient(&l->attn_proj, s.d_sum, s.in, filled, l->add);

    for (int b = 0; b < l->B; b++)
        for (int h = 0; h < l->H; h++) attend_backward(l, &kept, &s.room, s.d_y, s.d_qkv, b, h);

    for (int first = (R - 1) / STRIP * STRIP; first >= 0; first -= STRIP) { /* backwards: see `after` */
        int m = rows_of_strip(first, R);
        size_t at = (size_t)first / PAIR * LANES;
        num *d_qkv = s.d_qkv + (size_t)first * 3 * C;
        if (l->attn.bias)
            for (int i = 0; i < m; i++)
                for (int c = 0; c < 3 * C; c += LANES)
                    store(l->attn.d_bias + c, load(l->attn.d_bias + c) + from(d_qkv + i * 3 * C + c));
        lanes_are_columns(d_qkv, 3 * C, m, STRIP, 3 * C, s.d_in + at, panel);
        linear_backward(&l->attn, d_qkv, m, s.product);
        float *after = s.product + STRIP * C, *start = after + C; /* the first row of the strip behind, and of this */
        memcpy(start, s.product, C * sizeof *start);
        for (int i = 0; i < m; i++) {
            size_t row = first + i;
            float *d = s.product + i * C, *next = i + 1 < m ? d + C : after, scale = first_norm(l, row, s.row, s.h);
            if (l->shift)
                for (int c = 0; c < C; c += LANES) {
                    if (row % l->T) store(l->d_shift + c, load(l->d_shift + c) + load(d + c) * load(s.row + C + c));
                    if ((row + 1) % l->T) store(d + c, load(d + c) + load(next + c) * load(l->shift + c));
                }
            norm_row_backward(&l->norm_1, s.row, d, scale, C);
            for (int c = 0; c < C; c += LANES) to(d_x + row * C + c, load(d + c) + from(s.d_middle + row * C + c));
            round_row(s.h, s.strip + i * C, C);
        }
        memcpy(after, start, C * sizeof *start);
        lanes_are_columns(s.strip, C, m, STRIP, C, s.in + at, panel);
    }
    weight_gradient(&l->attn, s.d_in, s.in, filled, l->add);
}

/* ---------------------------------------------------------------------------------------------------------------------
   All layers */

/* The i-th layer with what it needs of a pass. What each keeps lies behind what those before it keep. */
static Layer prepared(const Layer *layers, const Pass *pass, int i) {
    Layer l = layers[i];
    l.B = pass->B, l.T = pass->T, l.threshold = pass->threshold, l.add = pass->add, l.seeds = pass->seeds + 3 * i;
    size_t each = keep(&l, NULL).end - (char *)NULL;
    l.kept = pass->kept + i * each;
    l.out = i == pass->layers - 1 ? pass->out : keep(&l, l.kept).out;
    l.x = i == 0 ? pass->x : keep(&l, l.kept - each).out;
    return l;
}

/* How many bytes pass->kept and pass->scratch must have. Of the layers it needs C and H alone. */
void sizes(const Layer *layers, const Pass *pass, int64_t *kept, int64_t *scratch) {
    Layer l = *layers;
    l.B = pass->B, l.T = pass->T;
    *kept = pass->layers * (keep(&l, NULL).end - (char *)NULL);
    *scratch = make_scratch(&l, NULL).end - (char *)NULL;
}

void forward(const Layer *layers, const Pass *pass) {
    for (int i = 0; i < pass->layers; i++) {
        Layer l = prepared(layers, pass, i);
        layer_forward(&l, pass->scratch);
    }
}

void backward(const Layer *layers, const Pass *pass) {
    const num *d = pass->d_out;
    for (int i = pass->layers - 1; i >= 0; i--, d = pass->d_x) {
        Layer l = prepared(layers, pass, i);
        layer_backward(&l, d, pass->d_x, pass->scratch);
    }
}
