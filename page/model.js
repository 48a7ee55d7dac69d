"use strict";
/*
 * The forward pass: tokens in, logits of what comes next out. GPT is model.py's, Modern is modern.py's, and what both
 * have in common is in Transformer. Read them beside each other: the names are the same.
 *
 *     const model = readModel(header, base64, SimdArithmetic);
 *     const cache = model.newCache();
 *     const logits = model.forward([5, 1, 7], cache); // (3, V); the next call goes on after these three
 *
 * Shapes in the comments: T tokens read now, S tokens read in all, C channels, H heads of D = C / H channels, V tokens
 * in the vocabulary. Arrays are flat, row after row: element (t, c) of a (T, C) array is array[t * C + c].
 */

const CHUNK = 32; // the most tokens in one call of forward: for so many there is memory for what lies between

/** What each layer keeps of the tokens read so far. To forget the newest, lower `length`. */
class Cache {
  constructor({ n_layer, block_size, n_embd }, { shifts }) {
    const perLayer = () => Array.from({ length: n_layer }, () => new Float32Array(block_size * n_embd));
    this.width = n_embd;
    this.length = 0;
    this.keys = perLayer(); // each (block_size, C), the heads side by side
    this.values = perLayer();
    this.tokens = new Int32Array(block_size);
    this.inputs = shifts ? perLayer() : []; // what a layer read at each position, where it looks one position back
  }

  copyFrom(other) {
    this.length = other.length;
    this.tokens.set(other.tokens);
    for (const kept of ["keys", "values", "inputs"]) {
      this[kept].forEach((array, layer) => array.set(other[kept][layer].subarray(0, other.length * this.width)));
    }
  }
}

class Transformer {
  /** weights: {name: Float32Array}, in the arithmetic's memory. */
  constructor(config, weights, arithmetic) {
    const { n_embd: C, vocab_size: V } = config;
    Object.assign(this, { config, weights, arithmetic });
    this.x = arithmetic.array(CHUNK * C); // the residual stream
    this.h = arithmetic.array(CHUNK * C); // a normalised copy of it, and what a layer adds to it
    this.qkv = arithmetic.array(CHUNK * 3 * C); // queries, keys and values
    this.mlp = arithmetic.array(CHUNK * 4 * C);
    this.logits = arithmetic.array(CHUNK * V);
  }

  /** Bytes that the constructor takes of the arithmetic's memory. */
  static scratchBytes({ n_embd: C, vocab_size: V }) {
    return [C, C, 3 * C, 4 * C, V].reduce((sum, width) => sum + bytesOf(CHUNK * width), 0);
  }

  newCache() {
    return new Cache(this.config, this);
  }

  /**
   * Read T <= CHUNK more tokens; cache.length + T may not exceed block_size.
   *
   * Returns the logits after each, (T, V), in memory that the next call overwrites. record: an object that is given
   * `attention`, for each layer a (H, T, S) array, and `stream`, the last token's channels (C): as they enter the
   * first layer, and as they leave each.
   */
  forward(tokens, cache, record = null) {
    const T = tokens.length;
    const { n_embd: C, n_layer } = this.config;
    if (record) Object.assign(record, { attention: [], stream: [] });
    const keep = () => record && record.stream.push(this.x.slice((T - 1) * C, T * C));
    cache.tokens.set(tokens, cache.length);
    this.embed(tokens, cache);
    keep();
    for (let layer = 0; layer < n_layer; layer++) {
      this.block(layer, T, cache, record);
      keep();
    }
    cache.length += T;
    return this.head(this.x, T);
  }

  /** y (T, rows) = x (T, cols) w^T + b, with the weights called `name`; b where there is one. */
  linear(y, x, name, T, cols) {
    const w = this.weights[`${name}.weight`];
    const b = this.weights[`${name}.bias`];
    const rows = w.length / cols;
    this.arithmetic.matmul(y, w, x, T, rows, cols);
    if (b) for (let i = 0; i < T * rows; i++) y[i] += b[i % rows];
  }

  /**
   * Each position gathers the values of the positions whose keys match its query: softmax(q k^T / sqrt(D)) v.
   *
   * Reads this.qkv (T, 3C), adds its keys and values to the cache, leaves the heads' outputs (T, C) in this.h.
   * Positions of the future do not appear: a position's loop ends at itself.
   */
  attention(layer, T, cache, record) {
    const { n_embd: C, n_head: H } = this.config;
    const { qkv, h } = this;
    const D = C / H;
    const S = cache.length + T;
    const keys = cache.keys[layer];
    const values = cache.values[layer];
    for (let t = 0; t < T; t++) {
      keys.set(qkv.subarray(t * 3 * C + C, t * 3 * C + 2 * C), (cache.length + t) * C);
      values.set(qkv.subarray(t * 3 * C + 2 * C, (t + 1) * 3 * C), (cache.length + t) * C);
    }
    const recorded = record && new Float32Array(H * T * S);
    if (record) record.attention.push(recorded);
    const weights = new Float32Array(S);
    h.fill(0, 0, T * C);
    for (let head = 0; head < H; head++) {
      for (let t = 0; t < T; t++) {
        const seen = cache.length + t + 1; // itself and what is before it
        for (let s = 0; s < seen; s++) {
          weights[s] = dot(qkv, t * 3 * C + head * D, keys, s * C + head * D, D) / Math.sqrt(D);
        }
        softmax(weights, seen);
        for (let s = 0; s < seen; s++) {
          const weight = weights[s];
          const from = s * C + head * D;
          const to = t * C + head * D;
          for (let d = 0; d < D; d++) h[to + d] += weight * values[from + d];
        }
        if (record) recorded.set(weights.subarray(0, seen), (head * T + t) * S);
      }
    }
  }
}

/** model.py's GPT: GPT-2 exactly. */
class GPT extends Transformer {
  get shifts() {
    return false;
  }

  /** x (T, C) = a vector for each token + a vector for each position. */
  embed(tokens, { length: start }) {
    const C = this.config.n_embd;
    const wte = this.weights["transformer.wte.weight"];
    const wpe = this.weights["transformer.wpe.weight"];
    tokens.forEach((token, t) => {
      for (let c = 0; c < C; c++) this.x[t * C + c] = wte[token * C + c] + wpe[(start + t) * C + c];
    });
  }

  /** x += attn(ln_1(x)); x += mlp(ln_2(x)). */
  block(layer, T, cache, record) {
    const C = this.config.n_embd;
    const name = `transformer.h.${layer}`;
    const { x, h, qkv, mlp } = this;
    this.layerNorm(h, x, `${name}.ln_1`, T);
    this.linear(qkv, h, `${name}.attn.c_attn`, T, C); // (T, 3C)
    this.attention(layer, T, cache, record); // into h
    this.linear(qkv, h, `${name}.attn.c_proj`, T, C); // qkv has served: its memory takes the result (T, C)
    add(x, qkv, T * C);
    this.layerNorm(h, x, `${name}.ln_2`, T);
    this.linear(mlp, h, `${name}.mlp.c_fc`, T, C); // (T, 4C)
    for (let i = 0; i < T * 4 * C; i++) mlp[i] = gelu(mlp[i]);
    this.linear(h, mlp, `${name}.mlp.c_proj`, T, 4 * C); // (T, C)
    add(x, h, T * C);
  }

  layerNorm(y, x, name, T) {
    const C = this.config.n_embd;
    const weight = this.weights[`${name}.weight`];
    const bias = this.weights[`${name}.bias`];
    normalize(y, x, T, C);
    for (let i = 0; i < T * C; i++) y[i] = y[i] * weight[i % C] + (bias ? bias[i % C] : 0);
  }

  /** The logits (T, V) of a stream x (T, C). The table that reads tokens also writes them (tied weights). */
  head(x, T) {
    this.layerNorm(this.h, x, "transformer.ln_f", T);
    this.linear(this.logits, this.h, "transformer.wte", T, this.config.n_embd);
    return this.logits.subarray(0, T * this.config.vocab_size);
  }
}

const PRIME = 2 ** 31 - 1;

/** modern.py's Modern: n-grams, rotary positions, query-key norm, token shift, ReLU squared, soft-capped logits. */
class Modern extends Transformer {
  constructor(config, weights, arithmetic) {
    super(config, weights, arithmetic);
    const half = config.n_embd / config.n_head / 2;
    const angles = Array.from({ length: config.block_size * half }, (_, place) => {
      const [position, i] = [Math.floor(place / half), place % half];
      return position * 1000 ** (-i / Math.max(1, half - 1)); // from one radian a token to a thousandth
    });
    this.cos = Float32Array.from(angles, Math.cos); // (block_size, D / 2)
    this.sin = Float32Array.from(angles, Math.sin);
  }

  get shifts() {
    return true;
  }

  /** x (T, C) = norm of a vector for each token + one for each run of 2, 3, ... ngram tokens that ends with it. */
  embed(tokens, cache) {
    const { n_embd: C, ngram, ngram_rows: rows } = this.config;
    const wte = this.weights["wte.weight"];
    const table = this.weights["ngrams.table.weight"];
    tokens.forEach((token, t) => {
      const place = cache.length + t;
      const x = this.x.subarray(t * C, (t + 1) * C);
      x.set(wte.subarray(token * C, (token + 1) * C));
      let number = token + 2; // of the run, which says what row of the table is its own
      let factor = 1;
      for (let back = 1; back < ngram; back++) {
        factor = (factor * 1_000_003) % PRIME;
        number = (number + ((back <= place ? cache.tokens[place - back] : -1) + 2) * factor) % PRIME;
        const row = number % rows;
        add(x, table.subarray(row * C, (row + 1) * C), C);
      }
    });
    normalize(this.x, this.x, tokens.length, C);
  }

  /** h = norm(x); x += attn(h + shift * h one token earlier); x += mlp(norm(x)). */
  block(layer, T, cache, record) {
    const C = this.config.n_embd;
    const name = `layers.${layer}`;
    const { x, h, qkv, mlp } = this;
    normalize(h, x, T, C);
    this.tokenShift(cache.inputs[layer], this.weights[`${name}.shift`], T, cache.length);
    this.linear(qkv, h, `${name}.attn.c_attn`, T, C); // (T, 3C)
    this.rotate(T, cache.length);
    this.attention(layer, T, cache, record); // into h
    this.linear(qkv, h, `${name}.attn.c_proj`, T, C);
    add(x, qkv, T * C);
    normalize(h, x, T, C);
    this.linear(mlp, h, `${name}.mlp.c_fc`, T, C); // (T, 4C)
    for (let i = 0; i < T * 4 * C; i++) mlp[i] = mlp[i] > 0 ? mlp[i] * mlp[i] : 0;
    this.linear(h, mlp, `${name}.mlp.c_proj`, T, 4 * C); // (T, C)
    add(x, h, T * C);
  }

  /** Let some of the token before flow into each channel of h (T, C). inputs: h as it was, of every position. */
  tokenShift(inputs, shift, T, start) {
    const C = this.config.n_embd;
    inputs.set(this.h.subarray(0, T * C), start * C);
    for (let t = start === 0 ? 1 : 0; t < T; t++) {
      for (let c = 0; c < C; c++) this.h[t * C + c] += shift[c] * inputs[(start + t - 1) * C + c];
    }
  }

  /** Norm each head's query and key, and turn its channels i and i + D/2, a point in the plane, by the position. */
  rotate(T, start) {
    const { n_embd: C, n_head: H } = this.config;
    const half = C / H / 2;
    for (let t = 0; t < T; t++) {
      for (let head = 0; head < 2 * H; head++) { // the queries' heads, then the keys'
        const from = t * 3 * C + head * 2 * half;
        const part = this.qkv.subarray(from, from + 2 * half);
        normalize(part, part, 1, 2 * half);
        for (let i = 0; i < half; i++) {
          const cos = this.cos[(start + t) * half + i];
          const sin = this.sin[(start + t) * half + i];
          const [a, b] = [part[i], part[i + half]];
          part[i] = a * cos + b * sin;
          part[i + half] = b * cos - a * sin;
        }
      }
    }
  }

  head(x, T) {
    const { n_embd: C, vocab_size: V } = this.config;
    normalize(this.h, x, T, C);
    this.linear(this.logits, this.h, "lm_head", T, C);
    for (let i = 0; i < T * V; i++) this.logits[i] = 15 * Math.tanh(this.logits[i] / 15);
    return this.logits.subarray(0, T * V);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Small functions

/** x += y, the first n numbers. */
function add(x, y, n) {
  for (let i = 0; i < n; i++) x[i] += y[i];
}

/** Scale each of T rows of C channels to mean 0 and variance 1. */
function normalize(y, x, T, C) {
  for (let from = 0; from < T * C; from += C) {
    let mean = 0;
    for (let c = 0; c < C; c++) mean += x[from + c] / C;
    let variance = 0;
    for (let c = 0; c < C; c++) variance += (x[from + c] - mean) ** 2 / C;
    const scale = 1 / Math.sqrt(variance + 1e-5);
    for (let c = 0; c < C; c++) y[from + c] = (x[from + c] - mean) * scale;
  }
}

/** Turn the first n scores into weights that sum to 1, in place. */
function softmax(scores, n) {
  let highest = -Infinity;
  for (let i = 0; i < n; i++) highest = Math.max(highest, scores[i]);
  let sum = 0;
  for (let i = 0; i < n; i++) sum += scores[i] = Math.exp(scores[i] - highest);
  for (let i = 0; i < n; i++) scores[i] /= sum;
}

/** The tanh form, as GPT-2 has it (Hendrycks & Gimpel 2016). */
function gelu(x) {
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights: export.py wrote them, this reads them

/**
 * header: {architecture, config, format, tensors: [{name, shape}]}, as export.py's `pack` made it.
 * base64: the numbers of all tensors in that order. A vector is float32. A matrix is float16 numbers or, in the format
 * int8, a float32 scale for each row and then whole numbers from -127 to 127, which are multiplied by it.
 */
function readModel(header, base64, Arithmetic) {
  const count = (shape) => shape.reduce((a, b) => a * b, 1);
  const kind = { GPT, Modern }[header.architecture];
  const needed = header.tensors.reduce((sum, { shape }) => sum + bytesOf(count(shape)), 0);
  const arithmetic = new Arithmetic(needed + kind.scratchBytes(header.config));
  const bytes = bytesFromBase64(base64);
  let offset = 0;
  const take = (Type, n) => { // the next n numbers of that type
    const end = offset + n * Type.BYTES_PER_ELEMENT;
    const numbers = new Type(bytes.buffer.slice(offset, end));
    offset = end;
    return numbers;
  };
  const weights = {};
  for (const { name, shape } of header.tensors) {
    const [rows, cols] = shape;
    const tensor = (weights[name] = arithmetic.array(count(shape)));
    if (shape.length === 1) {
      tensor.set(take(Float32Array, rows));
    } else if (header.format === "float16") {
      const halves = take(Uint16Array, rows * cols);
      const table = halfTable();
      for (let i = 0; i < tensor.length; i++) tensor[i] = table[halves[i]];
    } else {
      const scales = take(Float32Array, rows);
      const whole = take(Int8Array, rows * cols);
      for (let row = 0, i = 0; row < rows; row++) {
        for (let col = 0; col < cols; col++, i++) tensor[i] = whole[i] * scales[row];
      }
    }
  }
  return new kind(header.config, weights, arithmetic);
}

function bytesFromBase64(base64) {
  const bytes = new Uint8Array((base64.length / 4) * 3);
  const PIECE = 4 << 18; // so many characters at once: a long text is not held twice
  let n = 0;
  for (let from = 0; from < base64.length; from += PIECE) {
    const piece = atob(base64.slice(from, from + PIECE));
    for (let i = 0; i < piece.length; i++) bytes[n++] = piece.charCodeAt(i);
  }
  return bytes;
}

let halves = null;

/** The number that each of the 65536 float16 bit patterns means: sign, 5 bits of exponent, 10 bits of fraction. */
function halfTable() {
  halves ??= Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits >> 15 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = (bits & 1023) / 1024;
    return sign * (exponent === 0 ? fraction * 2 ** -14 : (1 + fraction) * 2 ** (exponent - 15));
  });
  return halves;
}
